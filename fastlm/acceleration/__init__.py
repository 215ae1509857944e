"""Any model faster in place: accelerate swaps its layers for fastlm's, restore takes the swap back.

    model = fastlm.accelerate(model)      print(fastlm.accelerated(model))      fastlm.restore(model)

A layer is recognised by what it computes, not by the name of an architecture, and each match is proved on a small copy
with random input before anything is swapped. Parameters, buffers, hooks and names stay where they are.
"""

from fastlm.acceleration.matching import Row
from fastlm.acceleration.swapping import Report, accelerate, accelerated, restore

__all__ = ["Report", "Row", "accelerate", "accelerated", "restore"]
