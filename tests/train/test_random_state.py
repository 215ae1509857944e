import json
import random

import numpy as np
import torch

from fastlm.train.random_state import capture, restore, seed_everything

CPU = torch.device("cpu")


def draw():
    return random.gauss(0, 1), float(np.random.standard_normal()), torch.randn(3).tolist(), random.random()


def test_restore_repeats_the_numbers_that_followed_capture():
    seed_everything(3)
    draw()  # leaves a spare normal number in Python's and NumPy's generators
    saved = json.loads(json.dumps(capture(CPU)))
    expected = [draw() for _ in range(3)]
    seed_everything(4)
    assert draw() != expected[0]
    restore(saved, CPU)
    assert [draw() for _ in range(3)] == expected


def test_seed_everything_repeats_all_three_generators():
    seed_everything(2**40 + 5)
    first = draw()
    seed_everything(2**40 + 5)
    assert draw() == first
