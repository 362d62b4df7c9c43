"""targets.predicted_time: what follows from the shapes alone."""

from __future__ import annotations

import dataclasses

import pytest

from mc_opt import ir, targets

PRICE = targets.Price(mul=1.0, add=1.0, shift=0.0, xnor=0.0, lookup=0.0, bytes=0.0, lanes=16)


def test_a_dense_layer_takes_its_multiplications():
    work = ir.dense_work((64, 32, 3, 3), outputs=100)
    assert targets.predicted_time([(64, 32, 3, 3)], outputs=100, price=PRICE) == 2 * work.mul


def test_whole_vectors_of_factors_take_their_multiplications():
    shapes = [(2, 8, 4, 1, 1), (2, 16, 8, 3, 3)]
    work = ir.factored_work(shapes, 1, outputs=100)
    assert targets.predicted_time(shapes, 1, outputs=100, price=PRICE) == 2 * work.mul


def test_a_vector_is_paid_for_whole():
    times = [targets.predicted_time([(n, 32)], outputs=100, price=PRICE) for n in (17, 32, 33, 48)]
    assert times == [times[0], times[0], 1.5 * times[0], 1.5 * times[0]]


def test_one_vector_alone_waits_for_what_it_reads():
    times = [targets.predicted_time([(n, 32)], outputs=100, price=PRICE) for n in (3, 16, 32)]
    assert times[0] == times[1] == pytest.approx(0.8 * times[2])


def test_a_few_channels_behind_share_vectors():
    # Factor 2 makes 4 outputs, 8 numbers with its rank of 2, of every first channel; factor 1 then 32 x 4 numbers.
    time = targets.predicted_time([(2, 32, 8, 1, 1), (2, 4, 2, 1, 1)], 1, outputs=100, price=PRICE)
    assert time == pytest.approx(2 * 100 * (8 * 2 * 1.6 * 16 + 8 * 2 * 128))


def test_depthwise_groups_stand_in_vectors():
    one, most = (targets.predicted_time([(n, 1, 3, 3)], outputs=100, group=n, price=PRICE) for n in (2, 16))
    assert one == most == pytest.approx(2.7 * 2 * 100 * 16 * 9)


# Factor 1 runs first, from 4 x 4 inputs of a row to 4 x 4, then factor 2 to 4 x 16.
@pytest.mark.parametrize(("field", "units"), [("call", 2), ("traffic", 100 * (16 + 64) * 4), ("bytes", (16 + 64) * 4)])
def test_what_is_beside_the_multiplications(field, units):
    free = dict.fromkeys(("mul", "add", "shift", "xnor", "lookup", "bytes"), 0.0)
    price = targets.Price(**{**free, "lanes": 16, field: 1.0})
    assert targets.predicted_time([(4, 4), (16, 4)], 0, outputs=100, price=price) == units


def test_stages_of_one_kernel_hand_nothing_on():
    shapes = [(134, 64, 1, 1, 1), (134, 1, 1, 3, 3), (134, 1, 64, 1, 1)]
    apart = dataclasses.replace(PRICE, mul=0.005, add=0.005, call=400.0, traffic=0.05)
    times = [
        targets.predicted_time(shapes, 1, outputs=56 * 56, price=dataclasses.replace(apart, cache=cache))
        for cache in (0, 1 << 20)
    ]
    handed = 2 * 56 * 56 * 134 * 4 * 0.05 + 2 * 400
    assert times[0] - times[1] == pytest.approx(handed, rel=0.02)  # weights are read again for each block
