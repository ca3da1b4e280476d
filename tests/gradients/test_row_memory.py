"""Rows that are let go give their memory to the next ones, and only then."""

import torch

from source_proj.gradients.memory import RowMemory

CPU = torch.device("cpu")


def test_memory_is_used_again_when_nobody_holds_any_part_of_it():
    memory = RowMemory()
    first = memory.zeros(4, 6, CPU).add_(1)
    place = first.data_ptr()
    for holder in (lambda t: t[2], lambda t: t.numpy(), lambda t: t.detach(), lambda t: t.untyped_storage()):
        kept = holder(first)
        del first
        other = memory.zeros(4, 6, CPU)
        assert other.data_ptr() != place
        assert not other.any()
        del kept, other
        first = memory.zeros(4, 6, CPU)
        place = first.data_ptr()
    first.add_(1)
    del first
    again = memory.zeros(4, 6, CPU)
    assert again.data_ptr() == place
    assert not again.any()


def test_other_shapes_and_large_rows_have_memory_of_their_own():
    memory = RowMemory()
    rows = [memory.zeros(*shape, CPU) for shape in ((4, 6), (6, 4), (4, 6), (4, 6), (0, 6), (1 << 12, 1 << 11))]
    assert len({x.data_ptr() for x in rows if x.numel()}) == 5
    assert not any(bool(x.any()) for x in rows)
