#!/usr/bin/env bash
# Everything from a fresh clone: makes .venv if need be, then runs every notebook that is not up to date.
#   ./run_all.sh [--profile smoke|mini|paper] [--only NN] [--from NN] [--dry-run] [--list] [--help]
#   ./run_all.sh test [--slow]      all tests          ./run_all.sh check      is everything there?
#   ./run_all.sh test --slow --write-reliability       also writes results/reliability.csv
# DL_SETTINGS=my.toml names a file with your own paths and sizes (dl/config.py), DL_RESULTS another results folder.
# PYTHON=/path/to/python3.11 chooses the interpreter that .venv is made from.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"      # sh run_all.sh
set -euo pipefail
root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)"
cd -- "$root"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
venv="$root/.venv"
unset PIP_TARGET PIP_PREFIX PIP_ROOT PYTHONHOME      # of another environment

say() { printf 'run_all: %s\n' "$*"; }
fail() { printf 'run_all: %s\n' "$*" >&2; exit 1; }
right_version() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' >/dev/null 2>&1; }
has_pins() { right_version "$1" && "$1" -m dl check --pins-only >/dev/null 2>&1; }
lock_hash() { "$1" -c 'import hashlib; print(hashlib.sha256(open("requirements.lock", "rb").read()).hexdigest())'; }

# Whether a process is another run_all.sh. A number left over from a container that was stopped may be this script's own.
is_install() {
  [[ $1 =~ ^[0-9]+$ && $1 != "$$" && $1 != "$PPID" ]] && kill -0 "$1" 2>/dev/null &&
    { cat "/proc/$1/cmdline" 2>/dev/null || ps -p "$1" -o command= 2>/dev/null; } | grep -qa run_all
}

# step LABEL COMMAND...: run quietly into the log, with a line of life every half minute
step() {
  local label=$1 began=$SECONDS said=0 pid
  shift
  say "$label"
  "$@" >>"$venv/install.log" 2>&1 &
  pid=$!
  trap 'kill "$pid" 2>/dev/null; printf "\nrun_all: stopped while installing; the next start begins the install anew\n" >&2; exit 130' INT TERM HUP
  while kill -0 "$pid" 2>/dev/null; do
    sleep 0.5
    if (( SECONDS - began >= said + 30 )); then
      said=$(( SECONDS - began ))
      printf '         … %d s: %.100s\n' "$said" "$(tail -n 1 "$venv/install.log" | tr -d '\r')"
    fi
  done
  wait "$pid" || fail "$label: failed, the last lines are
$(tail -n 5 "$venv/install.log")
All of it: $venv/install.log"
  trap - INT TERM HUP
}

find_python() {      # prints an interpreter of a right version that can make virtual environments
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3.12 python3 python; do
    if right_version "$candidate" && "$candidate" -c 'import ensurepip, venv' >/dev/null 2>&1; then
      printf '%s\n' "$candidate"
      return
    fi
  done
  fail "no Python 3.11 or 3.12 with its venv module was found (tried ${PYTHON:+$PYTHON, }python3.11, python3.12, python3, python): install one, or name it: PYTHON=/path/to/python3.11 ./run_all.sh"
}

install() {
  local began=$SECONDS base owner pip clear=
  [[ ! -L $venv ]] || fail ".venv is a link, and an install would change the environment it leads to: remove the link"
  if [[ -f "$venv/.installing" ]]; then
    owner="$(cat "$venv/.installing")"
    if is_install "$owner"; then
      fail "another run_all.sh (process $owner) is installing into .venv: wait for it"
    fi
    clear=--clear      # an install that was cut off is done again
  fi
  if [[ -n $clear ]] || ! right_version "$venv/bin/python" || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    base="$(find_python)"
    say "making .venv with $("$base" --version) and installing about 200 packages (2.6 GB with a CPU torch, 3 to 10 minutes; once)"
    mkdir -p "$venv"
    echo "$$" >"$venv/.installing"
    "$base" -m venv --clear "$venv" || fail "$base -m venv $venv failed: remove .venv and start again"
  else
    say "bringing .venv to the versions of requirements.lock"
  fi
  echo "$$" >"$venv/.installing"
  rm -f "$venv/.lock-sha256"
  pip=("$venv/bin/python" -m pip install --no-user --disable-pip-version-check --no-input --progress-bar off)
  step "1 of 3: torch and what it needs" "${pip[@]}" -c requirements.lock "$(grep '^torch==' requirements.lock)"
  step "2 of 3: the other packages, at the versions of requirements.lock" "${pip[@]}" --no-deps -r requirements.lock
  step "3 of 3: this package" "${pip[@]}" --no-deps --no-build-isolation -e .
  "$venv/bin/python" -m dl check --pins-only || fail "the install ended but is not what pyproject.toml pins: see $venv/install.log"
  lock_hash "$venv/bin/python" >"$venv/.lock-sha256"
  rm -f "$venv/.installing"
  say "installed in $(( SECONDS - began )) s"
}

# --help, --list and wrong options are answered by any Python from 3.11 on, before an install.
answer='import sys; from dl.__main__ import answer; sys.exit(answer(sys.argv[1:]))'      # 0, or 100 + the exit code
any_python=
for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3.12 python3 python; do
  if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
    any_python="$candidate"
    break
  fi
done
if [[ -n $any_python && ${1:-} != test && ${1:-} != check ]]; then
  code=0
  PYTHONDONTWRITEBYTECODE=1 "$any_python" -c "$answer" run "$@" || code=$?      # another code: the install finds out why
  (( code < 100 )) || exit $(( code - 100 ))
fi

# An active environment with the right versions is used as it is; else .venv, made anew if its stamp is not the lock's.
python=
for candidate in ${PYTHON:+"$PYTHON"} python3 python; do
  if has_pins "$candidate"; then
    python="$(command -v "$candidate")"
    break
  fi
done
if [[ -z $python ]]; then
  python="$venv/bin/python"
  if ! right_version "$python" || [[ "$(cat "$venv/.lock-sha256" 2>/dev/null)" != "$(lock_hash "$python")" ]]; then
    if [[ ${1:-} == check && -n $any_python ]]; then
      right_version "$python" || python="$(command -v "$any_python")"      # it says what is missing
    else
      install
    fi
  fi
fi
export PATH="$(dirname "$python"):$PATH"

case "${1:-}" in
  test)
    shift
    export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"     # a thread for each file
    exec "$python" -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@"
    ;;
  check) exec "$python" -m dl "$@" ;;
  *) exec "$python" -m dl run "$@" ;;
esac
