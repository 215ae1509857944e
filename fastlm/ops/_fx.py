"""torch.fx sees each public function as one call, as it sees PyTorch's own.

A function that is given a proxy for a tensor leaves itself in the graph, before it asks anything of the proxy.
"""

import inspect
from collections.abc import Callable
from typing import Any

from torch.overrides import handle_torch_function


def recorded(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """The proxy of function(**arguments), of which the graph holds those that are no defaults."""
    signature = inspect.signature(function)
    given = {name: x for name, x in arguments.items() if x is not signature.parameters[name].default}
    call = signature.bind(**given)
    return handle_torch_function(function, tuple(given.values()), *call.args, **call.kwargs)
