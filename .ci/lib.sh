# shellcheck shell=bash
# What .ci/run and .ci/matrix share. Sourced; sets `here` (the checkout) and `work` (removed at exit).
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_PROGRESS_BAR=off PIP_QUIET=1 HF_HUB_OFFLINE=1

say() { printf '\n=== %s (%ss)\n' "$*" "$SECONDS"; }

# A fresh copy in $work/NAME of the files that a clone would have, uncommitted changes included: links stay links.
checkout() {
  mkdir -p "$work/$1"
  (cd "$here" && git ls-files -z --cached --others --exclude-standard |
    while IFS= read -r -d '' f; do if [ -e "$f" ] || [ -L "$f" ]; then printf '%s\0' "$f"; fi; done |
    tar --null --no-recursion --files-from=- -cf -) | tar -xf - -C "$work/$1"
  git -C "$work/$1" init -q && git -C "$work/$1" add -A
  cd "$work/$1"
}
