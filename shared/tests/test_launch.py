"""The launcher wrapper with made-up launchers: what it runs, refuses and leaves alone."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.core.errors import BadInput, Unsupported
from trimtab.core.plan import Objective, Plan, Slot
from trimtab.hosts import host_order, launch, launcher_command
from trimtab.hosts.deepspeed import launching as deepspeed

# A launcher that shows what it was started with, or ends as its last word says. Its second line is
# a command to sh and a string to Python, for `#!` cannot name a Python whose path has a space.
SHOWING = f"""#!/bin/sh
"exec" "{sys.executable}" "$0" "$@"
import json, os, signal, sys
print(json.dumps({{"argv": sys.argv[1:], "env": dict(os.environ), "pid": os.getpid()}}), flush=True)
word = sys.argv[-1]
if word.startswith("exit-"):
    sys.exit(int(word[5:]))
if word.startswith("signal-"):
    os.kill(os.getpid(), getattr(signal, word[7:]))
if word == "echo":
    sys.stdout.write(sys.stdin.read())
    sys.stderr.write("to stderr")
if word == "wait":
    signal.pause()
"""

# A launcher in a language that, unlike Python, does not ignore SIGPIPE by itself.
IGNORED = "#!/bin/sh\nexec grep SigIgn /proc/self/status\n"

PLUGIN = """
    from pydantic import BaseModel
    from trimtab.core.hooks import PluginInfo, hookimpl
    from trimtab.core.launch import LaunchChange

    class Options(BaseModel, extra="forbid"):
        backwards: bool = False
        mood: str = ""
        argument: str = ""

    @hookimpl
    def trimtab_info():
        return PluginInfo("lays ranks", 'the "trimtab" block', Options)

    @hookimpl
    def trimtab_launch(config, launch):
        environment = {"MOOD": config.mood} if config.mood else {}
        environment["SEEN"] = launch.environment.get("MOOD", "none")
        return LaunchChange(
            environment=environment,
            hosts=dict(reversed(launch.hosts.items())) if config.backwards else {},
            launcher_arguments=(config.argument,) if config.argument else (),
        )
"""


@pytest.fixture
def launchers(site, tmp_path, monkeypatch):
    """A site with made-up launchers on PATH and the versions of real frameworks."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("torchrun", SHOWING), ("deepspeed", SHOWING), ("srun", IGNORED)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(deepspeed, "DEFAULT_HOSTFILE", str(tmp_path / "none"))
    site.add("torch", "2.13.0+cpu")
    site.add("deepspeed", "0.19.8")
    return site


@pytest.fixture
def lays(launchers):
    """Two plugins about training, the second the same as the first."""
    for name in ("lays", "stacks"):
        launchers.add(
            f"trimtab-{name}",
            entry_points={"trimtab.plugins": {name: f"{name}_plugin"}},
            files={f"{name}_plugin.py": PLUGIN},
        )
    return launchers


@pytest.fixture
def hostfile(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("# ours\na slots=2\nb  slots=2  # new\n\nc slots=4\n")
    return path


def config(tmp_path: Path, block: object) -> str:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"train_batch_size": 4, "trimtab": block}))
    return str(path)


@pytest.fixture
def prepare(tmp_path):
    """Prepares a launch with a hostfile for the plan."""

    def prepare(command, environment, order):
        path = tmp_path / "order"
        path.write_text("".join(f"{host} slots={slots}\n" for host, slots in order.items()))
        return launch.prepare(command, environment, path)

    return prepare


def plan(*ranks: tuple[str, int]) -> Plan:
    objective = Objective(metric="spread", unit="1", better="lower", value=1)
    slots = tuple(Slot(node=node, device=device) for node, device in ranks)
    return Plan(planner="placement", objective=objective, ranks=slots)


# The launcher alone


def test_the_command_gets_its_words_environment_and_process(launchers):
    words = ["--nproc-per-node", "4", "train.py", "--", "--plan", "x y", ""]
    with subprocess.Popen(
        [sys.executable, "-m", "trimtab.cli", "launch", "--", "torchrun", *words],
        stdout=subprocess.PIPE,
        env=launchers.environment(OURS="1"),
    ) as process:
        shown = json.loads(process.communicate(timeout=60)[0])
    assert shown["argv"] == words
    assert shown["pid"] == process.pid
    bare = subprocess.run(
        ["torchrun"], capture_output=True, env=launchers.environment(OURS="1"), check=True
    )
    assert shown["env"] == json.loads(bare.stdout)["env"]


def test_streams_are_the_launchers_own(launchers):
    done = subprocess.run(
        [sys.executable, "-m", "trimtab.cli", "launch", "--", "torchrun", "echo"],
        input="said\n",
        capture_output=True,
        text=True,
        env=launchers.environment(),
        check=True,
    )
    assert done.stdout.endswith("}\nsaid\n")
    assert done.stderr == "to stderr"


@pytest.mark.parametrize("status", [0, 1, 7, 255])
def test_exit_status(launchers, status):
    assert launchers.trimtab("launch", "--", "torchrun", f"exit-{status}").returncode == status


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGABRT"])
def test_death_by_a_signal_is_the_shells_to_see(launchers, name):
    ended = launchers.trimtab("launch", "--", "torchrun", f"signal-{name}")
    assert ended.returncode == -getattr(signal, name)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_signals_reach_the_launcher(launchers, name):
    with subprocess.Popen(
        [sys.executable, "-m", "trimtab.cli", "launch", "--", "torchrun", "wait"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=launchers.environment(),
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(getattr(signal, name))
        assert process.wait(timeout=60) == -getattr(signal, name)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_no_signal_is_ignored_on_the_launchers_behalf(launchers):
    bare = subprocess.run(
        ["srun"], capture_output=True, text=True, env=launchers.environment(), check=True
    )
    assert launchers.trimtab("launch", "--", "srun").stdout == bare.stdout


# What is refused


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "no command to launch; give it after --"),
        (["--"], "no command to launch; give it after --"),
        (["torchrun", "train.py"], "no command to launch; give it after --"),
        (["--", "mpirun", "-n", "4"], "'mpirun' starts no known launcher; known are deepspeed"),
        (["--", "python", "train.py"], "'python' starts no known launcher"),
        (["--", "python", "train.py", "-m", "torch.distributed.run"], "no known launcher"),
        (["--", "./gone/torchrun", "train.py"], "there is no program './gone/torchrun'"),
        (["--plan", "gone.json", "--", "torchrun", "x"], "gone.json: there is no such file"),
    ],
)
def test_refused_with_one_sentence(launchers, arguments, sentence):
    ended = launchers.trimtab("launch", *arguments)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("trimtab: ")
    assert ended.stderr.count("\n") == 1
    assert sentence in ended.stderr


def test_a_launcher_that_cannot_run(launchers, tmp_path):
    (tmp_path / "torchrun").write_bytes(b"\x7fELF nonsense")
    (tmp_path / "torchrun").chmod(0o755)
    ended = launchers.trimtab("launch", "--", "./torchrun", "train.py")
    assert ended.returncode == 2
    assert "torchrun cannot be run (Exec format error)" in ended.stderr


# The launchers' command lines

words = st.text(alphabet=st.sampled_from("ab-=_./ "), max_size=8)
starts = st.sampled_from(
    [["torchrun"], ["deepspeed"], ["srun"], ["/x/python3.11", "-X", "dev", "-m"]]
)


@given(starts, st.lists(words))
def test_parsing_keeps_every_word(start, rest):
    start = [*start, "torch.distributed.run"] if "-m" in start else start
    assert launcher_command.parse([*start, *rest]).words == (*start, *rest)


@pytest.mark.parametrize(
    ("command", "job"),
    [
        ("torchrun --nproc_per_node=4 --standalone t.py --nnodes 9", "t.py --nnodes 9"),
        ("torchrun --nproc-per-node 4 -m -r 3 --stand pkg.mod -m x", "pkg.mod -m x"),
        ("python3 -u -W error -m torch.distributed.run --nnodes 2 t.py", "t.py"),
        ("deepspeed -Hhosts -q --num_gpus 4 --no_local_rank t.py -H x", "t.py -H x"),
        ("/venv/bin/ds --module --include a@b:0,1 mod.train 1", "mod.train 1"),
        ("torchrun --nnodes", ""),
        ("srun -n 4 -l --exclusive --mpi=pmix python t.py -n 9", "python t.py -n 9"),
    ],
)
def test_where_the_job_begins(command, job):
    assert " ".join(launcher_command.parse(command.split()).job) == job


@pytest.mark.parametrize(
    "given_as", ["--node-rank 3", "--node_rank=3", "--node-r 3", "--node-rank 1 --node-rank 3"]
)
def test_options_are_found_and_replaced_in_any_spelling(given_as):
    parsed = launcher_command.parse(f"torchrun {given_as} --nnodes 4 t.py --node-rank 5".split())
    assert parsed.option("--node-rank") == "3"
    replaced = parsed.with_option(("--node-rank",), "0", as_="--node-rank")
    assert " ".join(replaced.words) == "torchrun --node-rank 0 --nnodes 4 t.py --node-rank 5"


# Hosts in order


def test_deepspeed_gets_a_hostfile_in_the_plans_order(launchers, prepare, hostfile, tmp_path):
    command = ["deepspeed", "--hostfile", str(hostfile), "--master_addr=a", "t.py"]
    order = host_order.hosts_of(plan(("c", 0), ("c", 1), ("a", 0), ("a", 1)))
    prepared = prepare(command, os.environ, order)
    parsed = launcher_command.parse(prepared.command)
    written = parsed.option("--hostfile")
    assert written is not None
    assert Path(written).read_text() == "c slots=2\na slots=2\n"
    assert parsed.option("--master-addr") == "c"
    assert parsed.job == ("t.py",)
    again = prepare(command, os.environ, order)
    assert again == prepared
    kept = [path.name for path in (tmp_path / "cache").iterdir()]
    exported = Path(prepared.environment["DS_ENV_FILE"])
    assert sorted(kept) == sorted([Path(written).name, exported.name])
    assert exported.read_text() == f"TRIMTAB_PLAN={prepared.environment['TRIMTAB_PLAN']}"


def test_hosts_that_the_order_leaves_out_are_told(launchers, prepare, hostfile, tmp_path):
    command = ["deepspeed", "-H", str(hostfile), "t.py"]
    assert prepare(command, {"TRIMTAB_HOST": "c"}, {"c": 2}).idle == ("a", "b")
    assert prepare(command, {}, {"c": 2, "a": 2, "b": 2}).idle == ()
    allocation = {"SLURM_JOB_NODELIST": "n[1-3]"}
    assert prepare(["srun", "t.py"], allocation, {"n3": 1, "n1": 1}).idle == ("n2",)
    assert launch.prepare(["deepspeed", "t.py"], allocation).idle == ()
    ended = launchers.trimtab("launch", "--plan", str(tmp_path / "order"), "--", *command)
    assert ended.returncode == 2  # n1 and n3 are in no line of the hostfile
    (tmp_path / "order").write_text("c slots=2\na slots=2\n")
    ended = launchers.trimtab("launch", "--plan", str(tmp_path / "order"), "--", *command)
    assert ended.stderr.endswith("\ntrimtab: b is left without a rank.\n")


def test_a_plan_is_hostfile_enough(launchers, prepare):
    prepared = prepare(["deepspeed", "t.py"], {}, {"x": 8, "w": 8})
    written = launcher_command.parse(prepared.command).option("--hostfile")
    assert written is not None
    assert Path(written).read_text() == "x slots=8\nw slots=8\n"


def test_an_order_that_is_there_already_changes_nothing(launchers, prepare, hostfile):
    command = ("deepspeed", "-H", str(hostfile), "t.py")
    prepared = prepare(command, {}, {"a": 2, "b": 2, "c": 4})
    assert prepared.command == command
    assert prepared.environment.keys() == {"TRIMTAB_PLAN", "DS_ENV_FILE"}


@pytest.mark.parametrize(
    ("order", "sentence"),
    [
        ({"a": 2, "z": 1}, "'z', which has no line there"),
        ({"a": 3, "b": 2}, "'a', which has slots=2"),
    ],
)
def test_a_hostfile_without_room(launchers, prepare, hostfile, order, sentence):
    with pytest.raises(BadInput, match=sentence):
        prepare(["deepspeed", "-H", str(hostfile), "t.py"], {}, order)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [("d slots=x", "hosts:6: 'd slots=x' is no entry"), ("a slots=9", "'a' is given twice")],
)
def test_a_hostfile_that_deepspeed_would_refuse(launchers, prepare, hostfile, line, sentence):
    hostfile.write_text(f"{hostfile.read_text()}{line}\n")
    with pytest.raises(BadInput, match=sentence):
        prepare(["deepspeed", f"--hostfile={hostfile}", "t.py"], {}, {"c": 1, "a": 1})


@pytest.mark.parametrize(
    ("own", "rank"), [("b.cluster", 0), ("a", 1), ("a.elsewhere", 1), ("10.0.0.7", 2)]
)
def test_torchrun_gets_this_nodes_place(launchers, prepare, own, rank):
    given_to = "--nnodes 3 --node_rank=2 --master-addr=a t.py --node-rank 9"
    command = ["torchrun", *given_to.split()]
    order = {"b.cluster": 2, "a.cluster": 2, "10.0.0.7": 2}
    environment = {"TRIMTAB_HOST": own}
    words = " ".join(prepare(command, environment, order).command)
    numbers = f"--nnodes 3 --node-rank {rank} --master-addr b.cluster --nproc-per-node 2"
    assert words == f"torchrun {numbers} t.py --node-rank 9"


@pytest.mark.parametrize(
    ("command", "environment", "order", "sentence"),
    [
        ("torchrun --nnodes 3 t.py", {}, {"a": 2, "b": 2}, "--nnodes is 3, where the plan has 2"),
        ("torchrun t.py", {"PET_NNODES": "3"}, {"a": 2, "b": 2}, "--nnodes is 3"),
        ("torchrun --nproc_per_node 4 t.py", {}, {"a": 2, "b": 2}, "--nproc-per-node is 4"),
        ("torchrun t.py", {}, {"a": 2, "b": 1}, "torchrun needs as many on every host"),
        ("torchrun --standalone t.py", {}, {"a": 2, "b": 2}, "--standalone is for one host, and"),
        (
            "torchrun --rdzv-backend=etcd-v2 t.py",
            {"TRIMTAB_HOST": "a"},
            {"a": 2},
            "--rdzv-backend etcd-v2 numbers",
        ),
        (
            "torchrun --rdzv-backend c10d --nnodes 1:3 t.py",
            {"TRIMTAB_HOST": "a"},
            {"a": 2, "b": 2},
            "--nnodes is 1:3, where the plan has 2; give 2, or leave it out",
        ),
        (
            "torchrun t.py",
            {"TRIMTAB_HOST": "a", "PET_RDZV_BACKEND": "c10d", "PET_NNODES": "3"},
            {"a": 2},
            "is 3, where",
        ),
        *(
            (command, {"TRIMTAB_HOST": "z"}, {"a": 2}, "'z', is not one host of the plan; set")
            for command in (
                "torchrun t.py",
                "torchrun --rdzv-backend c10d --rdzv-endpoint a:1 t.py",
                "torchrun --standalone t.py",
                "deepspeed t.py",
            )
        ),
        (
            "deepspeed --no_ssh --node_rank 0 t.py",
            {"TRIMTAB_HOST": "z"},
            {"a": 2, "b": 2},
            "'z', is not one host of the plan; set TRIMTAB_HOST to one of a, b",
        ),
        (
            "deepspeed --launcher slurm t.py",
            {},
            {"a": 2, "b": 2},
            "leaves the order of the hosts to Slurm",
        ),
        ("srun -n 3 t.py", {}, {"a": 2}, "--ntasks is 3, where the plan has 2"),
        ("srun -N2 t.py", {}, {"a": 2}, "--nodes is 2, where the plan has 1"),
        ("srun -m block t.py -m arbitrary", {}, {"a": 2}, "--distribution is block, which numbers"),
        ("srun --nodelist=a t.py", {}, {"a": 2}, "--nodelist contradicts the plan's list"),
        ("srun -F file t.py", {}, {"a": 2}, "-F contradicts the plan's list"),
        ("srun --mpi=none torchrun t.py", {}, {"a": 2}, "srun would start torchrun once for each"),
        ("srun t.py", {"SLURM_JOB_NODELIST": "b[1-3]"}, {"a": 2}, "'a' is not in this allocation"),
        (
            "deepspeed t.py",
            {"SLURM_JOB_NODELIST": "a[1"},
            {"a": 2},
            "brackets of 'a\\[1' do not match",
        ),
        (
            "torchrun --rdzv-backend c10d t.py",
            {"SLURM_JOB_NODELIST": "b[1,3]"},
            {"b1": 2, "b2": 2, "c": 2},
            "'b2' and 1 more is not in this allocation",
        ),
    ],
)
def test_an_order_that_cannot_be_given(launchers, prepare, command, environment, order, sentence):
    with pytest.raises(BadInput, match=sentence):
        prepare(command.split(), environment, order)


@pytest.mark.parametrize(
    ("given_as", "nodes"), [("", "--nnodes 2 "), ("--nnodes 2 ", ""), ("--nnodes=2:2 ", "")]
)
def test_the_dynamic_rendezvous_is_replaced_by_ours(launchers, prepare, given_as, nodes):
    command = f"torchrun {given_as}--rdzv-backend c10d --rdzv-conf read_timeout=9 t.py".split()
    here = {"TRIMTAB_HOST": "a"}
    parsed = launcher_command.parse(prepare(command, here, {"b": 2, "a": 2}).command)
    conf = parsed.option("--rdzv-conf")
    assert conf is not None
    settings = dict(entry.split("=") for entry in conf.split(","))
    assert Path(settings.pop("plan")).read_text() == "b slots=2\na slots=2\n"
    assert settings == {"read_timeout": "9", "strict": "true"}
    words = " ".join(parsed.words).replace(conf, "CONF")
    ours = f"--rdzv-backend trimtab --rdzv-conf CONF {nodes}--nproc-per-node 2"
    assert words == f"torchrun {ours} {given_as}t.py"


@pytest.mark.parametrize(
    ("conf", "environment"), [(["--rdzv-conf", "strict=0"], {}), ([], {"TRIMTAB_STRICT": "0"})]
)
def test_a_rendezvous_that_shall_only_warn(launchers, prepare, conf, environment):
    command = ["torchrun", "--rdzv-backend", "c10d", *conf, "t.py"]
    prepared = prepare(command, {"TRIMTAB_HOST": "a", **environment}, {"b": 2, "a": 2})
    passed = launcher_command.parse(prepared.command).option("--rdzv-conf")
    assert passed is not None
    assert "strict=true" not in passed


@pytest.mark.parametrize(
    ("given_as", "passed"),
    [([], ""), (["--launcher", "pdsh"], ""), (["--launcher_args=-t 9"], "-t 9 ")],
)
def test_more_hosts_than_deepspeed_lets_pdsh_start_at_once(launchers, prepare, given_as, passed):
    order = {f"n{number}": 8 for number in range(1025)}
    parsed = launcher_command.parse(prepare(["deepspeed", *given_as, "t.py"], {}, order).command)
    assert parsed.option("--launcher-args") == f"{passed}-f 1025"
    assert parsed.job == ("t.py",)
    del order["n0"]
    parsed = launcher_command.parse(prepare(["deepspeed", *given_as, "t.py"], {}, order).command)
    assert parsed.option("--launcher-args") == (passed.strip() or None)


def test_as_many_hosts_in_the_plans_order_already(launchers, prepare, hostfile):
    order = {f"n{number}": 1 for number in range(1025)}
    hostfile.write_text("".join(f"{host} slots=1\n" for host in order))
    parsed = launcher_command.parse(
        prepare(["deepspeed", "-H", str(hostfile), "t.py"], {}, order).command
    )
    assert parsed.option("-H", "--hostfile") == str(hostfile)
    assert parsed.option("--launcher-args") == "-f 1025"


def test_more_hosts_than_deepspeed_can_name_to_pdsh(launchers, prepare):
    order = {f"n{number:05}": 8 for number in range(12_000)}
    with pytest.raises(Unsupported, match=r"12,000 hosts to pdsh in one argument; give --launcher"):
        prepare(["deepspeed", "t.py"], {}, order)
    command = ["deepspeed", "--launcher", "openmpi", "t.py"]
    parsed = launcher_command.parse(prepare(command, {}, order).command)
    assert parsed.option("--launcher-args") is None
    written = parsed.option("--hostfile")
    assert written is not None
    assert Path(written).read_text().splitlines()[-1] == "n11999 slots=8"


# What DeepSpeed's options choose of a hostfile. The order leaves out "b" and half of "c".

ORDER = {"c": 2, "a": 2}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--include c@a@b", "--include names 'b', which the plan does not"),
        ("--include=c", "--include leaves out 'a', where the plan has ranks; leave it out"),
        ("-ic:0@a", "--include chooses other devices of 'c' than the plan"),
        ("--i c:2,3@a", "--include chooses other devices of 'c' than the plan"),
        ("--incl c:x", "--include has 'c:x', which is no host with devices; write HOST@HOST:0,1"),
        ("--exclude a", "--exclude leaves out 'a', where the plan has ranks; leave it out, or"),
        ("-e b@c:1,3", "--exclude leaves out devices of 'c', where the plan has ranks"),
        ("--num_nodes 1", "--num_nodes is 1, where the plan has 2; give 2, or leave it out"),
        ("--num_nodes=3", "--num_nodes is 3, where the plan has 2"),
        ("--num_gpus 1", "--num_gpus is 1, where the plan has 2; give 2, or leave it out"),
        ("--num_accelerators +4", "--num_gpus is 4, where the plan has 2"),
    ],
)
@pytest.mark.parametrize("has_file", [True, False])
def test_options_of_deepspeed_that_contradict_the_order(
    launchers, prepare, hostfile, options, sentence, has_file
):
    file = ["-H", str(hostfile)] if has_file else []
    with pytest.raises(BadInput, match=re.escape(sentence)):
        prepare(["deepspeed", *file, *options.split(), "t.py"], {}, ORDER)
    hostfile.write_text("c slots=2\na slots=2\n")  # the plan's order already
    with pytest.raises(BadInput, match=re.escape(sentence)):
        prepare(["deepspeed", *file, *options.split(), "t.py"], {}, ORDER)


def test_devices_that_differ_between_hosts_are_no_one_number(launchers, prepare):
    with pytest.raises(BadInput, match="is 2, where the plan has 1 or 2; leave it out"):
        prepare(["deepspeed", "--num_gpus", "2", "t.py"], {}, {"a": 2, "b": 1})


@pytest.mark.parametrize(
    "options",
    ["--include a@c:0,1", "--include a:0,1,1@c", "--num_nodes 2 --num_gpus 2", "--num_nodes -1"],
)
def test_options_of_deepspeed_that_say_what_the_plan_says(launchers, prepare, hostfile, options):
    command = ["deepspeed", "-H", str(hostfile), *options.split(), "t.py"]
    parsed = launcher_command.parse(prepare(command, {}, ORDER).command)
    assert " ".join(parsed.options[2:]) == options


def test_excluding_what_the_plan_leaves_out_is_said_by_the_hostfile(launchers, prepare, hostfile):
    command = ["deepspeed", "-H", str(hostfile), "--exclude", "b@c:2,3", "t.py"]
    parsed = launcher_command.parse(prepare(command, {}, ORDER).command)
    assert parsed.options[0] == "--hostfile"
    assert len(parsed.options) == 2
    prepared = prepare(command, {}, {"a": 2, "c": 2})
    assert prepared.command == tuple(command)  # where DeepSpeed's own order is the plan's
    assert prepared.idle == ("b",)


@pytest.mark.parametrize(
    ("options", "hosts"),
    [
        ("", {"a": 2, "b": 2, "c": 4}),
        ("--include c:1,3@a", {"a": 2, "c": 2}),
        ("--include b@b:1", {"b": 1}),
        ("--exclude a@c:0", {"b": 2, "c": 3}),
        ("--exclude a:0,1@a", {"b": 2, "c": 4}),
        ("--num_nodes 2", {"a": 2, "b": 2}),
        ("--num_gpus 1", {"a": 1, "b": 1, "c": 1}),
        ("--num_nodes 9 --num_gpus=2", {"a": 2, "b": 2, "c": 2}),
        ("--num_nodes 0 --num_gpus x", {"a": 2, "b": 2, "c": 4}),
    ],
)
def test_the_hosts_at_hand_are_those_that_deepspeed_would_use(hostfile, options, hosts):
    command = launcher_command.parse(["deepspeed", "-H", str(hostfile), *options.split(), "t.py"])
    assert deepspeed.hosts(command) == hosts
    assert list(deepspeed.hosts(command)) == list(hosts)


def test_deepspeed_on_every_node_by_itself_gets_its_place(launchers, prepare, hostfile):
    command = ["deepspeed", "-H", str(hostfile), "--no_ssh", "--node_rank=0", "t.py"]
    prepared = prepare(command, {"TRIMTAB_HOST": "a"}, ORDER)
    parsed = launcher_command.parse(prepared.command)
    assert parsed.option("--node-rank") == "1"
    assert "DS_ENV_FILE" not in prepared.environment
    assert prepared.environment["TRIMTAB_PLAN"]


def test_one_host_is_this_machine_unless_deepspeed_is_forced_to_go_there(launchers, prepare):
    assert prepare(["deepspeed", "t.py"], {"TRIMTAB_HOST": "a.cluster"}, {"a": 2})
    assert prepare(["deepspeed", "t.py"], {"TRIMTAB_HOST": "b"}, {"localhost": 2})
    forced = ["deepspeed", "--force_multi", "t.py"]
    assert "DS_ENV_FILE" in prepare(forced, {"TRIMTAB_HOST": "b"}, {"a": 2}).environment


def test_hosts_of_deepspeed_are_looked_for_in_the_allocation_without_a_hostfile(launchers, prepare):
    inside = {"SLURM_JOB_NODELIST": "n[1-2]"}
    assert prepare(["deepspeed", "t.py"], inside, {"n2": 1, "n1": 1})
    with pytest.raises(BadInput, match="'n3' is not in this allocation"):
        prepare(["deepspeed", "t.py"], inside, {"n2": 1, "n3": 1})


def test_standalone_with_one_host_gets_its_number_of_ranks(launchers, prepare):
    prepared = prepare(["torchrun", "--standalone", "t.py"], {"TRIMTAB_HOST": "a"}, {"a": 3})
    assert " ".join(prepared.command) == "torchrun --nproc-per-node 3 --standalone t.py"


def test_srun_gets_a_host_for_each_task(launchers, prepare):
    environment = {"SLURM_JOB_NODELIST": "n[01-03]"}
    command = ["srun", "-l", "--mpi", "none", "python", "t.py", "-n", "9"]
    prepared = prepare(command, environment, {"n03": 2, "n01": 2})
    ours = "--distribution arbitrary --ntasks 4 --nodes 2"
    assert " ".join(prepared.command) == f"srun {ours} -l --mpi none python t.py -n 9"
    hostfile = Path(prepared.environment["SLURM_HOSTFILE"])
    assert hostfile.read_text() == "n03\nn03\nn01\nn01\n"


def test_a_plan_without_ranks_and_one_across_machines(tmp_path):
    with pytest.raises(BadInput, match="a placement plan has no ranks to launch"):
        host_order.hosts_of(plan())
    for ranks in ([("a", 0), ("b", 0), ("a", 1)], [("a", 1)], [("a", 1), ("a", 0)]):
        with pytest.raises(Unsupported, match="across machines in turn, or leaves devices"):
            host_order.hosts_of(plan(*ranks))


def test_a_plan_that_is_not_for_launching_names_its_file(launchers, tmp_path):
    path = tmp_path / "fleet.json"
    plan().write(path)
    ended = launchers.trimtab("launch", "--plan", str(path), "--", "torchrun", "t.py")
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"trimtab: {path}: a placement plan has no ranks to launch")


def test_what_is_run_is_said_on_stderr(launchers, tmp_path):
    path = tmp_path / "plan.json"
    plan(("b", 0), ("a", 0)).write(path)
    ended = launchers.trimtab(
        "launch", "--plan", str(path), "--", "torchrun", "t.py", TRIMTAB_HOST="a"
    )
    argv = "--nnodes 2 --node-rank 1 --master-addr b --nproc-per-node 1 t.py"
    assert " ".join(json.loads(ended.stdout)["argv"]) == argv
    assert ended.stderr == f"trimtab: launching torchrun {argv}\n"


# Plugins


def test_plugins_change_the_launch_in_the_users_order(lays, tmp_path):
    block = {"stacks": {"mood": "calm", "argument": "--no_ssh"}, "lays": {"argument": "-q"}}
    command = [
        "deepspeed",
        "--num_gpus",
        "4",
        "t.py",
        "--deepspeed_config",
        config(tmp_path, block),
    ]
    prepared = launch.prepare(command, {"HOME": "/nowhere"})
    assert prepared.command == ("deepspeed", "-q", "--no_ssh", *command[1:])
    assert prepared.environment == {"HOME": "/nowhere", "MOOD": "calm", "SEEN": "calm"}


def test_a_configuration_that_the_job_does_not_name(lays, tmp_path):
    path = Path(config(tmp_path, {"lays": {"mood": "calm"}}))
    prepared = launch.prepare(["torchrun", "t.py"], {}, config=path)
    assert prepared.environment == {"MOOD": "calm", "SEEN": "none"}
    path.write_text("{}")
    with pytest.raises(BadInput, match=r"ds\.json: there is no 'trimtab' block; add one"):
        launch.prepare(["torchrun", "t.py"], {}, config=path)


def test_a_plugin_sees_and_orders_the_hosts(lays, hostfile, tmp_path):
    (tmp_path / ".deepspeed_env").write_text("OTHER=kept\n")
    path = config(tmp_path, {"lays": {"backwards": True, "mood": "two words"}})
    ended = lays.trimtab(
        *["launch", "--", "deepspeed", "-H", str(hostfile), "t.py", f"--deepspeed={path}"],
        HOME=str(tmp_path / "nowhere"),
    )
    shown = json.loads(ended.stdout)
    written = Path(shown["argv"][1])
    assert written.read_text() == "c slots=4\nb slots=2\na slots=2\n"
    exported = Path(shown["env"]["DS_ENV_FILE"])
    assert exported.read_text().splitlines() == ["OTHER=kept", "MOOD=two words", "SEEN=none"]


def test_without_an_order_the_options_of_deepspeed_are_the_users_own(lays, hostfile, tmp_path):
    block = config(tmp_path, {"lays": {"mood": "calm"}})
    command = ["deepspeed", "-H", str(hostfile), "--include", "b@c:1", "t.py", "--deepspeed", block]
    prepared = launch.prepare(command, {})
    assert prepared.command == tuple(command)
    assert prepared.idle == ()
    assert "MOOD=calm" in Path(prepared.environment["DS_ENV_FILE"]).read_text().splitlines()


def test_a_value_that_cannot_reach_other_hosts(lays, hostfile, tmp_path):
    path = config(tmp_path, {"lays": {"mood": "$HOME"}})
    with pytest.raises(BadInput, match="MOOD is '\\$HOME', which DeepSpeed cannot pass on"):
        launch.prepare(["deepspeed", "-H", str(hostfile), "t.py", "--deepspeed", path], {})


def test_an_unverified_framework_is_refused_where_a_plugin_acts(lays, tmp_path):
    lays.add("deepspeed", "0.20.0", folder="newer")
    block = config(tmp_path, {"lays": {}})
    with pytest.raises(Unsupported, match=r"deepspeed 0\.20\.0 is outside the verified range"):
        launch.prepare(["deepspeed", "t.py", "--deepspeed_config", block], {})
    untouched = ("deepspeed", "t.py")
    assert launch.prepare(untouched, {}).command == untouched
