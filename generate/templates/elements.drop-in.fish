# Those that virt-dib finds, which lies beside the command on the line, where ELEMENTS_PATH has it search.
function _@FUNCTION@_elements
    set -l program (commandline -opc)[1]
    set program (string replace -r '^~/' $HOME/ -- $program)
    if string match -q '*/*' -- $program
        set program (string replace -r '[^/]*$' virt-dib -- $program)
    else
        set program virt-dib
    end
    set -l where
    for directory in (string split : -- "$ELEMENTS_PATH")
        test -d "$directory"; and set -a where -p $directory
    end
    $program $where --list-elements 2>/dev/null
end
