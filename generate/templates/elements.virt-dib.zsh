# Those that the command on the line finds where the line has it search.
@FUNCTION@_elements() {
    local -a where names
    local i
    for ((i = 2; i < CURRENT; i++)); do
        case $words[i] in
            -B) where+=(-B ${~words[i + 1]}) ;;
            -p | --element-path) where+=(-p ${~words[i + 1]}) ;;
            --element-path=*) where+=(-p ${~words[i]#*=}) ;;
        esac
    done
    names=(${(f)"$(${~words[1]} $where --list-elements 2>/dev/null)"})
    compadd "$@" -a names
}
