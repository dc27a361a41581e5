# Those that virt-dib finds, which lies beside the command on the line, where ELEMENTS_PATH has it search.
@FUNCTION@_elements() {
    local -a where names
    local directory program=${~words[1]}
    for directory in ${(s.:.)ELEMENTS_PATH}; do
        [[ ! -d $directory ]] || where+=(-p $directory)
    done
    if [[ $program == */* ]]; then
        program=${program:h}/virt-dib
    else
        program=virt-dib
    fi
    names=(${(f)"$($program $where --list-elements 2>/dev/null)"})
    compadd "$@" -a names
}
