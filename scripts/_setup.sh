# Sourced by the other scripts, from the repository's root: makes .venv with the pinned set, or reuses it.
#
#   prepare_venv EXTRAS    EXTRAS: what to install beside the package itself: "" or "[test]"
#
# The interpreter is $PYTHON, or python3. A stamp is written when everything is installed: a hash of
# constraints.txt, pyproject.toml, the extras and the interpreter. While it matches, nothing is done; when it
# does not, pip brings the environment up to date.

VENV=.venv

prepare_venv() {
    local extras="$1" python="${PYTHON:-python3}" version stamp
    version=$("$python" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])') || {
        echo "no Python at '$python': set PYTHON to an interpreter of version 3.10 or newer" >&2
        return 1
    }
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
        echo "'$python' is Python $version; 3.10 or newer is needed: set PYTHON=/path/to/python" >&2
        return 1
    fi
    stamp="$version $(cat constraints.txt pyproject.toml | "$python" -c \
        'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')"

    # A stamp of the test set serves the smaller set too.
    for have in "$extras" "[test]"; do
        if [ "$(cat "$VENV/stamp$have" 2>/dev/null)" = "$stamp" ]; then
            return 0
        fi
    done

    # Reuse what is there if it is of this Python and whole enough to install into.
    if ! "$VENV/bin/python" -c "import pip, sys; sys.exit(sys.version.split()[0] != '$version')" 2>/dev/null; then
        echo "making $VENV with Python $version"
        "$python" -m venv --clear "$VENV"
    fi
    rm -f "$VENV"/stamp*
    echo "installing into $VENV: this takes minutes (torch first, so that nothing else chooses a build of it)"
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".$extras"
    echo "$stamp" > "$VENV/stamp$extras"
}
