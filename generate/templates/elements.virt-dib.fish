# Those that the command on the line finds where the line has it search.
function _@FUNCTION@_elements
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
