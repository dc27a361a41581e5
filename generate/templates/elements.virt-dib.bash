# Those that the command on the line finds where the line has it search.
@FUNCTION@_elements()
{
    local arguments=() i option
    for ((i = 1; i < COMP_CWORD; i++)); do
        case ${COMP_WORDS[i]} in
            -B) option=-B ;;
            -p | --element-path) option=-p ;;
            *) continue ;;
        esac
        [[ ${COMP_WORDS[i + 1]} != "=" ]] || ((i++))
        arguments+=("$option" "${COMP_WORDS[i + 1]/#\~\//$HOME/}")
    done
    "${COMP_WORDS[0]/#\~\//$HOME/}" "${arguments[@]}" --list-elements 2>/dev/null
}
