"""RiverLevel is trained right, and forecasts an hour by the hours before it alone."""

import torch
from hypothesis import given, settings
from river_level.model import RiverLevel, error

import tbptt_props as tb


def records(case: tb.Case) -> list[dict[str, torch.Tensor]]:
    """Return batches as our loader makes them: rain, levels, and when a gauge was working."""
    return [
        {"rain": x, "level": y[..., 0], "working": (y[..., 0] > -1).to(x)}
        for x, y in case.tensors()
    ]


@tb.conformance()
def test_river_level(case: tb.Case) -> tb.Subject:
    return tb.Subject(
        RiverLevel(case.inputs, case.hidden, hours=case.chunk),
        loss=error,
        batches=records,
        parts=lambda b: (b["rain"], {"level": b["level"], "working": b["working"]}),
        contract=tb.Contract(clip_norm=1.0),
    )


@settings(max_examples=20, deadline=None)
@given(case=tb.cases(batches=1))
def test_rain_to_come_changes_no_level_before_it(case: tb.Case) -> None:
    torch.manual_seed(case.seed)
    model = RiverLevel(case.inputs, case.hidden).double()
    ((rain, _),) = case.tensors()
    known = rain[:, : case.chunk]

    with torch.no_grad():
        assert torch.allclose(model(known)[0], model(rain)[0][:, : case.chunk])
