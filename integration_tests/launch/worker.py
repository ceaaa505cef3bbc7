"""A rank without torch, which ends as it is told.

worker.py exit STATUS   ends with the status, on rank 2
worker.py show          prints its rank and the variable MOOD
worker.py wait          prints its process and waits
"""

import os
import sys
import time

_, *words = (word for word in sys.argv if not word.startswith("--local"))
rank = os.environ["RANK"]
if words[0] == "exit" and rank == "2":
    sys.exit(int(words[1]))
if words[0] == "show":
    # One write, so that lines of several ranks do not mix.
    shown = f"rank {rank} of {os.environ['WORLD_SIZE']} on {os.environ.get('HOST_NAME')}"
    os.write(1, f"{shown} local {os.environ['LOCAL_RANK']} {os.environ.get('MOOD')}\n".encode())
if words[0] == "wait":
    os.write(1, f"process {os.getpid()}\n".encode())
    time.sleep(600)
