# Sourced by the other scripts: makes a virtual environment in .venv with the pinned versions, and activates it.
# Afterwards `python` and `medusa-export` are those of the environment.

cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Some images set it. Then each process compiles torch and transformers again, which takes ten seconds.
unset PYTHONDONTWRITEBYTECODE

_extras=${MEDUSA_EXTRAS:-dev}
_stamp=".venv/installed-$_extras"
_wanted=$(cat pyproject.toml constraints.txt | cksum)
if [ "$(cat "$_stamp" 2>/dev/null)" != "$_wanted" ]; then
  echo "Installing medusa-export[$_extras] into .venv …" >&2
  # An earlier attempt may have left an incomplete environment, or one of an older Python.
  .venv/bin/python -c 'import sys, pip; assert sys.version_info >= (3, 11)' 2>/dev/null ||
    "${PYTHON:-python3}" -m venv --clear .venv
  # Python compiles a module when it is first imported. To compile all 15,000 now would take a minute.
  _pip=(.venv/bin/python -m pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt)
  "${_pip[@]}" --upgrade pip  # Python's own one may be years old, and take half a minute longer to find 200 packages
  "${_pip[@]}" --editable ".[$_extras]"
  echo "$_wanted" > "$_stamp"
fi
. .venv/bin/activate
export PYTHON=python
