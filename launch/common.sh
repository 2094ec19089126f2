# shellcheck shell=bash
# What the launch scripts share: sourced by them, from the repository's folder.

dry_run=""  # yes: `step` prints only

# One line on standard error, and the exit code of a user's mistake.
mistake() {
  echo "error: $*" >&2
  exit 2
}

# Prints the comment at the head of a script, and ends.
usage() {
  sed -n '2,${/^# /!q;s/^# //p}' "$1"
  exit 0
}

# The value of an option: value --name NAME ...
value() {
  if [ $# -lt 2 ] || [ -z "$2" ] || [ "${2#--}" != "$2" ]; then mistake "$1 needs a value"; fi
  echo "$2"
}

# The command as a line that a shell reads back.
quoted() {
  local word line=""
  for word in "$@"; do
    case "$word" in
      *[!A-Za-z0-9_./:=,@%+-]* | "") line+=" '${word//\'/\'\\\'\'}'" ;;
      *) line+=" $word" ;;
    esac
  done
  echo "${line# }"
}

# Runs a command, or prints it.
step() {
  if [ -n "$dry_run" ]; then quoted "$@"; else "$@"; fi
}

# What main.py would answer for these, only after all the set-up.
check_training() {
  local wanted word found
  for wanted in --config --workdir; do
    found=""
    for word in "$@"; do
      if [ "$word" = "$wanted" ] || [ "${word#"$wanted"=}" != "$word" ]; then found=yes; fi
    done
    if [ -z "$found" ]; then mistake "$wanted is missing; see launch/README.md for the commands"; fi
  done
}
