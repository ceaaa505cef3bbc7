"""What the engine says of a branch's end, and how it is read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.branches.note import Fate, Note

scores = st.integers(0, 10_000).map(lambda n: n / 10_000)


@given(
    st.builds(
        Note,
        st.sampled_from(Fate),
        st.sampled_from([1, 2]),
        st.none() | scores,
        st.integers(0, 10**6),
        st.none() | st.integers(0, 10**6) | st.text(max_size=20),
        st.dictionaries(st.integers(0, 255), scores, max_size=5),
        st.none() | st.tuples(scores, scores),
    )
)
def test_a_note_is_read_as_it_was_written(note: Note) -> None:
    assert Note.read(note.to_text()) == note


@pytest.mark.parametrize(
    "said",
    [
        None,
        7,
        "",
        "###",
        "trimtab.branches",
        '["trimtab.branches"]',
        '{"trimtab.branches":2,"fate":"finished","phase":1,"score":null,"tokens":1,"stop":null}',
        '{"trimtab.branches":1,"fate":"eaten","phase":1,"score":null,"tokens":1,"stop":null}',
        '{"trimtab.branches":1,"fate":"finished"}',
    ],
)
def test_other_stop_reasons_are_no_notes(said: object) -> None:
    assert Note.read(said) is None


def test_what_is_no_number_is_no_score() -> None:
    text = '{"trimtab.branches":1,"fate":"pruned","phase":1,"score":true,"tokens":1,"stop":null}'
    note = Note.read(text)
    assert note is not None
    assert note.score is None
