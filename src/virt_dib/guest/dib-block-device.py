#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""dib-block-device as a command, which DIB 2.0 to 2.3 had: its package, made to run with the Python of today."""

import json
import sys
from typing import IO, Any

sys.path.insert(0, "/dib/site")

import yaml
from diskimage_builder import block_device
from diskimage_builder.block_device import blockdevice


class Listed(dict[str, Any]):
    """A mapping whose keys are a list, as in Python 2: DIB asks for the first of them."""

    def keys(self) -> list[str]:  # type: ignore[override] # that is the point
        """The keys."""
        return list(super().keys())


class Json:
    """The module json as DIB uses it, with such mappings."""

    dump = staticmethod(json.dump)

    @staticmethod
    def load(stream: IO[str]) -> object:
        """What is in the file *stream*."""
        return json.load(stream, object_hook=Listed)


class Yaml:
    """The module yaml as DIB uses it, with such mappings."""

    @staticmethod
    def safe_load(text: str) -> object:
        """What *text* says; it has no more than JSON could say."""
        return json.loads(json.dumps(yaml.safe_load(text)), object_hook=Listed)


blockdevice.json = Json
blockdevice.yaml = Yaml
sys.exit(block_device.main())
