# SPDX-License-Identifier: Apache-2.0
"""What is made of other sources when virt-dib is built: manual pages, completion, catalogues of messages."""
