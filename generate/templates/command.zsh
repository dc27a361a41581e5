#compdef @COMMAND@
# SPDX-License-Identifier: Apache-2.0
# Made from the table of options when virt-dib is built.

@ELEMENTS@
_arguments -s -S : \
@OPTIONS@
    @ARGUMENTS@
