"""torchrun's dynamic rendezvous (c10d), with the nodes numbered as a plan wants them.

``torchrun --rdzv-backend trimtab`` uses it; the plan is named by ``plan`` in ``--rdzv-conf`` or by
``TRIMTAB_PLAN``. The c10d rendezvous does all the work; then the agent that it made the first
reads the others' names, sorts them by the plan, and tells each its rank.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence

from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    RendezvousTimeoutError,
    rendezvous_handler_registry,
)

from trimtab.core.errors import BadInput
from trimtab.hosts.host_order import difference, new_ranks, own_host, read_order
from trimtab.hosts.job_variables import PLAN_VARIABLE, STRICT_VARIABLE
from trimtab.hosts.torch.launching import BACKEND, PLAN_SETTING, STRICT_SETTING

log = logging.getLogger("trimtab")


class PlannedRendezvous(RendezvousHandler):
    """A rendezvous that gives the nodes their ranks in a plan's order.

    Nodes that the plan does not name come after the others, and planned ones may be missing: then
    it warns, or refuses where ``strict`` in ``--rdzv-conf`` or ``TRIMTAB_STRICT`` is set, as
    ``trimtab launch`` does.

    Args:
        inner: the rendezvous that brings the nodes together.
        parameters: what torchrun was told.
        order: hosts in the plan's order.
    """

    def __init__(
        self, inner: RendezvousHandler, parameters: RendezvousParameters, order: Sequence[str]
    ) -> None:
        self._inner = inner
        self._backend = parameters.backend
        self._local_address = parameters.local_addr
        self._strict = parameters.get_as_bool(
            STRICT_SETTING, os.environ.get(STRICT_VARIABLE, "0") not in ("", "0")
        )
        self._order = order
        self._host = own_host()

    @classmethod
    def of(cls, parameters: RendezvousParameters) -> PlannedRendezvous:
        """The rendezvous that torchrun's parameters describe.

        Raises:
            BadInput: there is no plan, or it cannot be read.
        """
        path = parameters.get(PLAN_SETTING) or os.environ.get(PLAN_VARIABLE)
        if not path:
            raise BadInput(
                f"--rdzv-backend {BACKEND} has no plan",
                fix=f"name one by --rdzv-conf {PLAN_SETTING}=FILE or in {PLAN_VARIABLE}",
            )
        order = list(read_order(path))
        settings = {key: value for key, value in parameters.config.items() if key != PLAN_SETTING}
        c10d = RendezvousParameters(
            "c10d",
            parameters.endpoint,
            parameters.run_id,
            parameters.min_nodes,
            parameters.max_nodes,
            parameters.local_addr,
            **settings,
        )
        return cls(rendezvous_handler_registry.create_handler(c10d), parameters, order)

    def next_rendezvous(self) -> RendezvousInfo:
        found = self._inner.next_rendezvous()
        rank = self._planned_rank(found)
        bootstrap = found.bootstrap_store_info
        if os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "0") == "1":
            # The first worker hosts the store then, and its node is another one now.
            store = PrefixStore(f"{BACKEND}/bootstrap", found.store)
            bootstrap = RendezvousStoreInfo.build(rank, store, self._local_address)
        assert bootstrap is not None
        return RendezvousInfo(found.store, rank, found.world_size, bootstrap)

    def _planned_rank(self, found: RendezvousInfo) -> int:
        """This node's rank; the store is that of one round, so a restart finds nothing old."""
        store = PrefixStore(BACKEND, found.store)
        store.set(str(found.rank), self._host)
        if found.rank == 0:
            store.set("ranks", json.dumps(self._numbered(store, found.world_size)))
        answer = json.loads(_read(store, "ranks", "the first node"))
        if isinstance(answer, str):
            raise BadInput(answer)
        return int(answer[found.rank])

    def _numbered(self, store: Store, count: int) -> list[int] | str:
        """The rank of each node, or why there is none."""
        hosts = [_read(store, str(rank), f"node {rank}") for rank in range(count)]
        differs = difference(self._order, hosts)
        if differs:
            sentence = f"the nodes that are there differ from the plan's: {differs}"
            if self._strict:
                return sentence
            log.warning("trimtab: %s.", sentence)
        return new_ranks(self._order, hosts)

    @property
    def use_agent_store(self) -> bool:
        return self._inner.use_agent_store

    def get_backend(self) -> str:
        return self._backend

    def is_closed(self) -> bool:
        return self._inner.is_closed()

    def set_closed(self) -> None:
        self._inner.set_closed()  # type: ignore[no-untyped-call]

    def num_nodes_waiting(self) -> int:
        return self._inner.num_nodes_waiting()

    def get_run_id(self) -> str:
        return self._inner.get_run_id()

    def shutdown(self) -> bool:
        return self._inner.shutdown()


def _read(store: Store, key: str, who: str) -> str:
    """A value from the store, for which it waits as long as the store's timeout."""
    try:
        return store.get(key).decode()
    except RuntimeError as error:
        raise RendezvousTimeoutError(
            f"{who} came to the rendezvous and then said nothing ({error})"
        ) from error
