# SPDX-License-Identifier: Apache-2.0
"""Build disk images from diskimage-builder elements inside a libguestfs appliance."""

__version__ = "2.0.0.dev0"
