# Those that virt-dib finds, which lies beside the command on the line, where ELEMENTS_PATH has it search.
@FUNCTION@_elements()
{
    local arguments=() program=${COMP_WORDS[0]/#\~\//$HOME/} directories directory
    IFS=: read -ra directories <<<"${ELEMENTS_PATH-}"
    for directory in "${directories[@]}"; do
        [[ ! -d $directory ]] || arguments+=(-p "$directory")
    done
    if [[ $program == */* ]]; then
        program=${program%/*}/virt-dib
    else
        program=virt-dib
    fi
    "$program" "${arguments[@]}" --list-elements 2>/dev/null
}
