# find_python VERSION: prints the interpreter of a version, such as 3.13, from the PATH or pyenv's, or nothing.
find_python() {
    local python
    for python in "$(command -v "python$1")" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$1".*/bin/python; do
        # pyenv puts a name on the PATH for versions that it has not switched on
        "$python" -c "" 2>/dev/null && echo "$python" && return 0
    done
    return 0
}
