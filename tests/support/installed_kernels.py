"""A pytest plugin: transformers registers its layers beside the `kernels` that is installed, whichever it asks for."""

import kernels
from transformers.utils import import_utils

ask = import_utils.is_kernels_available.__wrapped__
ask.__defaults__ = kernels.__version__, ask.__defaults__[1]
import_utils.is_kernels_available.cache_clear()
