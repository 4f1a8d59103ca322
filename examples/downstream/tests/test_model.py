import torch
from torch.nn.functional import mse_loss
from weather.model import Forecaster

import tbptt_props as tb


def build(case: tb.Case) -> tb.Subject:
    model = Forecaster(hidden=case.hidden, hours=case.chunk)
    return tb.Subject(model, loss=mse_loss, contract=tb.Contract(clip_norm=1.0))


@tb.conformance(inputs=3, outputs=1)
def test_trains_a_day_at_a_time(case: tb.Case) -> tb.Subject:
    return build(case)


def test_forecasts_an_hour_for_an_hour() -> None:
    forecast, _ = Forecaster(hidden=4)(torch.zeros(2, 48, 3))

    assert forecast.shape == (2, 48, 1)
