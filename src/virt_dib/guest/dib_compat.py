# SPDX-License-Identifier: Apache-2.0
"""What releases of DIB expect of Python and its libraries that those of today no longer have.

For their dib-block-device, on the host and in the guest. Nothing that is there is changed. Each entry says who needs
it.
"""

import collections
import collections.abc


def restore() -> None:
    """Bring it back."""
    # DIB 2.6 to 3.0. They moved to collections.abc, and have been gone from here since Python 3.10.
    for name in ("Iterable", "Mapping", "MutableMapping", "Sequence"):
        if not hasattr(collections, name):
            setattr(collections, name, getattr(collections.abc, name))

    # DIB 2.4 to 2.19. 'node' has been 'nodes' alone since networkx 2.4.
    import networkx as nx  # noqa: PLC0415 - DIB imports it too, but not in every process that imports this

    if not hasattr(nx.Graph, "node"):
        nx.Graph.node = property(lambda graph: graph.nodes)
