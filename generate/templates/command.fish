# SPDX-License-Identifier: Apache-2.0
# Made from the table of options when virt-dib is built.

@ELEMENTS@
# Several words in one, separated by commas.
function _@FUNCTION@_list
    set -l before (string match -r '^.*,' -- (string replace -r '^--[^=]*=' '' -- (commandline -ct)))
    for word in $argv
        contains -- $word (string split , -- "$before"); or printf '%s\n' "$before"$word
    end
end

@ARGUMENTS@
@OPTIONS@
