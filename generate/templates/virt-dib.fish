# SPDX-License-Identifier: Apache-2.0
# Made from the table of options when virt-dib is built.

# Those that the command on the line finds where the line has it search.
function __virt_dib_elements
    set -l words (commandline -opc)
    set -l where
    for i in (seq 2 (count $words))
        switch $words[$i]
            case -B
                set -a where -B $words[(math $i + 1)]
            case -p --element-path
                set -a where -p $words[(math $i + 1)]
            case '--element-path=*'
                set -a where -p (string replace -r '^[^=]*=' '' -- $words[$i])
        end
    end
    set -l program (string replace -r '^~/' $HOME/ -- $words[1])
    $program (string replace -r '^~/' $HOME/ -- $where) --list-elements 2>/dev/null
end

# Several words in one, separated by commas.
function __virt_dib_list
    set -l before (string match -r '^.*,' -- (string replace -r '^--[^=]*=' '' -- (commandline -ct)))
    for word in $argv
        contains -- $word (string split , -- "$before"); or printf '%s\n' "$before"$word
    end
end

complete -c virt-dib -f -a '(__virt_dib_elements)'
@OPTIONS@
