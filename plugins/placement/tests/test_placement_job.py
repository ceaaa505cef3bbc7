from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.core.errors import BadInput
from trimtab.placement.job import TrainingJob
from trimtab.placement.volumes import Shape, boundary_bytes

TINY = "{layers: 4, hidden: 64, vocab: 100}"
TIMES = "{unaligned: 2 s, data_aligned: 2 s, pipeline_aligned: 2 s}"
GPT_7B = Shape(layers=32, hidden=4096, vocab=50257, positions=4096)


def job(**values: Any) -> TrainingJob:
    return TrainingJob(**{"gpus_per_node": 8} | values)


def test_a_7b_model_has_the_papers_volumes() -> None:
    """Arnold's section 5.2 characterises it by 2 GB and 30 MB."""
    assert 2 * GPT_7B.stage_parameters(8) == pytest.approx(2.06e9, rel=0.01)
    assert boundary_bytes(GPT_7B, micro_batch=1, sequence_length=4096) == pytest.approx(
        33.6e6, rel=0.01
    )


def test_volumes_of_a_step_follow_from_the_sizes() -> None:
    plain = job(data_parallel=4, pipeline_parallel=2, tensor_parallel=8, shape=GPT_7B, zero_stage=0)
    found = plain.step_volumes()
    assert found is not None
    parameters = GPT_7B.stage_parameters(2) / 8
    assert found.data == pytest.approx(2 * 3 / 4 * 2 * parameters)
    micro_batches = 8
    assert found.pipeline == pytest.approx(2 * micro_batches * 2 * 4096 * 4096 / 8)
    assert found.expert == found.context == 0


def test_sharded_parameters_weigh_on_data_parallel_groups() -> None:
    def data(zero_stage: int) -> float:
        found = job(
            data_parallel=4,
            pipeline_parallel=2,
            tensor_parallel=8,
            shape=GPT_7B,
            zero_stage=zero_stage,
        ).step_volumes()
        assert found is not None
        return found.data

    assert data(0) == data(1) < data(2) < data(3)


def test_a_model_with_fewer_layers_than_chunks_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2,'
        ' "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,'
        ' "intermediate_size": 128, "vocab_size": 100, "max_position_embeddings": 64}'
    )
    path = tmp_path / "job.yaml"
    path.write_text("model: config.json\ndata_parallel: 8\npipeline_parallel: 3\n")
    with pytest.raises(
        BadInput, match=r"job\.yaml:3: pipeline_parallel is 3, which makes 3 chunks"
    ):
        TrainingJob.read(path)


def test_experts_have_fewer_replicas_and_tokens_visit_some_of_them() -> None:
    shape = Shape(
        layers=4, hidden=64, vocab=100, layer_parameters=1e6, expert_parameters=8e5, experts=8,
        active_experts=2,
    )  # fmt: skip
    found = job(data_parallel=8, expert_parallel=4, shape=shape, zero_stage=0).step_volumes()
    assert found is not None
    assert found.expert_data == pytest.approx(2 * 1 / 2 * 2 * 4 * 8e5 / 4)
    assert found.data == pytest.approx(2 * 7 / 8 * 2 * (4 * 2e5 + 64 * 100))
    # Forward and backward, to the experts and back: four times two experts' worth of activations.
    tokens = 4 * 4096 * 2
    assert found.expert == pytest.approx(4 * 4 * tokens * 64 * 2 * 3 / 4)
    assert shape.active_parameters == pytest.approx(2e5 + 8e5 / 4)


def test_keys_and_values_go_round_as_wide_as_they_are() -> None:
    def context(**values: int) -> float:
        shape = Shape(layers=4, hidden=64, vocab=100, **values)
        found = job(data_parallel=4, context_parallel=2, shape=shape).step_volumes()
        assert found is not None
        return found.context

    # Two forward, four backward, for four micro-batches of half a sequence.
    assert context() == 4 * 6 * 4 * (2 * 2048 * 64)
    assert context(key_value=16) == context() / 4


def test_an_open_job_has_no_volumes_yet() -> None:
    with pytest.raises(BadInput, match="no data_parallel"):
        job(shape=GPT_7B, expert_parallel=2).step_volumes()


def test_volumes_that_are_given_are_taken() -> None:
    given_volumes = job(data_parallel=8, volumes={"data": 5.0}).step_volumes()
    assert given_volumes is not None
    assert given_volumes.data == 5.0
    assert job(data_parallel=8).step_volumes() is None


sizes = st.integers(1, 4)


@given(tensor=sizes, data=sizes, pipeline=sizes)
def test_groups_are_deepspeeds(tensor: int, data: int, pipeline: int) -> None:
    """PipeModelDataParallelTopology: axes pipe, data, model; the last one fastest."""
    found = job(
        tensor_parallel=tensor, data_parallel=data, pipeline_parallel=pipeline, gpus_per_node=64
    )
    ranks = np.arange(found.world_size).reshape(pipeline, data, tensor)
    lists = {
        "pipeline": [ranks[:, d, t].tolist() for d in range(data) for t in range(tensor)],
        "data": [ranks[p, :, t].tolist() for p in range(pipeline) for t in range(tensor)],
        "tensor": [ranks[p, d].tolist() for p in range(pipeline) for d in range(data)],
    }
    for kind, groups in lists.items():
        assert sorted(found.groups(kind)) == sorted(groups)  # type: ignore[arg-type]


@given(tensor=sizes, data=sizes, pipeline=sizes, context=sizes)
def test_groups_of_the_other_order(tensor: int, data: int, pipeline: int, context: int) -> None:
    """A mesh of dimensions (dp, pp, cp, tp), as init_device_mesh numbers it."""
    found = job(
        tensor_parallel=tensor,
        data_parallel=data,
        pipeline_parallel=pipeline,
        context_parallel=context,
        order="tp-cp-ep-pp-dp",
        gpus_per_node=1024,
    )
    mesh = np.arange(found.world_size).reshape(data, pipeline, context, tensor)
    for axis, kind in enumerate(("data", "pipeline", "context", "tensor")):
        lines = np.moveaxis(mesh, axis, -1).reshape(-1, mesh.shape[axis]).tolist()
        assert sorted(found.groups(kind)) == sorted(lines)  # type: ignore[arg-type]


def test_expert_groups_are_megatrons() -> None:
    found = job(tensor_parallel=2, data_parallel=4, expert_parallel=2, pipeline_parallel=2)
    assert found.groups("expert")[:3] == [[0, 2], [1, 3], [4, 6]]


@given(
    tensor=st.sampled_from([1, 2, 4, 8]),
    data=st.integers(1, 12),
    pipeline=st.integers(1, 4),
    context=st.integers(1, 2),
    expert=st.integers(1, 4),
    order=st.sampled_from(["tp-cp-ep-dp-pp", "tp-cp-ep-pp-dp"]),
)
def test_cells_of_the_grid_are_the_nodes(order: str, **degrees: int) -> None:
    """Each cell is one node; data groups stay in columns, pipelines in rows, the rest in blocks."""
    try:
        found = job(order=order, **{f"{name}_parallel": n for name, n in degrees.items()})
    except ValueError:
        return
    grid = found.grid
    cells = list(itertools.product(range(grid.rows), range(grid.columns)))
    rank_of = {cell: grid.node_rank(*cell) for cell in cells}
    assert sorted(rank_of.values()) == list(range(grid.nodes))
    assert grid.rows % grid.block == 0
    cell_of = {rank: cell for cell, rank in rank_of.items()}

    def cells_of(group: list[int]) -> list[tuple[int, int]]:
        return [cell_of[rank // found.ranks_per_node] for rank in group]

    for group in found.groups("pipeline"):
        assert len({row for row, _ in cells_of(group)}) == 1
    if found.stage_major:
        for group in found.groups("data"):
            assert len({column for _, column in cells_of(group)}) == 1
    for kind in ("tensor", "context", "expert"):
        for group in found.groups(kind):  # type: ignore[arg-type]
            assert len({(row // grid.block, column) for row, column in cells_of(group)}) == 1


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"tensor_parallel": 3, "data_parallel": 8}, ["tensor_parallel", "divide"]),
        ({"tensor_parallel": 4, "data_parallel": 3, "pipeline_parallel": 2}, ["multiple", "8"]),
        ({"data_parallel": 8, "expert_parallel": 3}, ["expert_parallel", "divide"]),
        ({"data_parallel": 8, "alpha": -0.5}, ["alpha"]),
        ({"data_parallel": 8, "alpha": 1.5}, ["alpha"]),
        ({"data_parallel": 8, "alpha": "nan"}, ["alpha", "0 ", "1, or auto"]),
        ({"data_parallel": 8, "alpha": ".nan"}, ["alpha is nan", "0 ", "1, or auto"]),
        ({"data_parallel": 8, "alpha": "foo"}, ["alpha is 'foo'", "0 ", "1, or auto"]),
        ({"data_parallel": 8, "alpha": "true"}, ["alpha", "0 ", "1, or auto"]),
        ({"data_parallel": 8, "alpha": "[0.3]"}, ["alpha", "0 ", "1, or auto"]),
        (
            {"data_parallel": 8, "pipeline_parallel": 2, "virtual_stages": 10, "shape": TINY},
            ["virtual_stages is 10", "20 chunks of 4 layers", "at most 4"],
        ),
        (
            {"data_parallel": 8, "pipeline_parallel": 8, "shape": TINY},
            ["pipeline_parallel is 8", "8 chunks of 4 layers"],
        ),
        ({"data_parallel": 8, "overlap": "{data: 1.5}", "shape": TINY}, ["overlap.data", "1"]),
        ({"data_parallel": 8, "overlap": "{data: .nan}", "shape": TINY}, ["overlap.data"]),
        ({"data_parallel": 8, "overlap": "{data: -0.5}", "shape": TINY}, ["overlap.data", "0"]),
        ({"data_parallel": 8, "overlap": "{data: 0.5}"}, ["overlap", "model, shape or volumes"]),
        (
            {"data_parallel": 8, "overlap": "{data: 0.5}", "shape": TINY, "step_times": TIMES},
            ["overlap", "step_times", "one of them"],
        ),
        ({"data_parallel": 8, "step_times": "{unaligned: 2}"}, ["step_times", "missing"]),
        ({"data_parallel": 8, "step_times": TIMES.replace("2 s", "0")}, ["unaligned", "greater"]),
        ({"data_parallel": 8, "volumes": "{data: -1}"}, ["volumes.data", "0"]),
        ({"data_parallel": 8, "volumes": "{data: 1.0e+300}"}, ["volumes.data"]),
        ({"data_parallel": 8, "flop_per_s": 0}, ["flop_per_s"]),
        ({"data_parallel": 8, "bandwidth_bytes_per_s": -1}, ["bandwidth_bytes_per_s"]),
        ({"data_parallel": 8, "global_batch": 12}, ["global_batch", "multiple"]),
        ({"data_parallel": 8, "dp": 8}, ["dp"]),
        (
            {"data_parallel": 8, "expert_parallel": 2, "order": "tp-cp-ep-pp-dp"},
            ["expert_parallel", "tp-cp-ep-dp-pp"],
        ),
    ],
)
def test_a_wrong_job_is_one_clear_sentence(
    tmp_path: Path, values: dict[str, object], words: list[str]
) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("\n".join(f"{key}: {value}" for key, value in values.items()))
    with pytest.raises(BadInput) as raised:
        TrainingJob.read(path)
    message = str(raised.value)
    assert str(path) in message
    assert "\n" not in message
    assert all(word in message for word in words)


def test_a_job_fills_a_fixed_allocation() -> None:
    open_job = job(tensor_parallel=8, pipeline_parallel=2)
    assert open_job.sized(12).data_parallel == 6
    with pytest.raises(BadInput, match="12 or 14 nodes"):
        open_job.sized(13)
    assert job(tensor_parallel=8, data_parallel=3).sized(13).data_parallel == 3


def test_the_models_shape_is_read_beside_the_job(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2,'
        ' "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,'
        ' "intermediate_size": 128, "vocab_size": 100, "max_position_embeddings": 64}'
    )
    (tmp_path / "job.yaml").write_text("model: config.json\ndata_parallel: 8\n")
    found = TrainingJob.read(tmp_path / "job.yaml")
    shape = found.shape
    assert shape is not None
    assert shape.key_value == 32
    assert found.sized(1).shape == shape
    attention, network, norms = 64 * 64 * 2 + 2 * 64 * 32, 3 * 64 * 128, 2 * 64
    assert shape.layer_parameters == attention + network + norms
