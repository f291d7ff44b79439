#!/bin/bash
# until_done.sh DIR COMMAND...
#
# Run COMMAND, a training run with -o DIR -y 1, again after each crash, until it has ended by itself.
#
# Exit code 0 means that the run is complete. 2 means an error that trying again does not mend: a wrong flag or file,
# or a loss that is not finite. 129, 130, 138 and 143 mean that the run wrote a checkpoint and stopped on a signal:
# SIGHUP, Ctrl-C, SIGUSR1, SIGTERM. Any other code is a crash (a GPU or a node went away), after which -y 1 resumes
# from the newest checkpoint. This script gives up after two crashes with no checkpoint in between, as the same fault
# would strike for ever.
# COMMAND sees which attempt it is as $ATTEMPT, from 1.

dir=$1
shift
newest() { find "$dir" -maxdepth 1 -name 'DONE_*' 2>/dev/null | sort | tail -n 1; }
trap 'exit 130' INT TERM

export ATTEMPT=1
at_last_crash=none
while true; do
    "$@"
    code=$?
    case $code in
        0 | 2 | 129 | 130 | 138 | 143) exit $code ;;
    esac
    at_this_crash=$(newest)
    if [ "$at_this_crash" = "$at_last_crash" ]; then
        echo "until_done.sh: exit code $code again, and no new checkpoint in $dir since the last crash: giving up" >&2
        exit $code
    fi
    at_last_crash=$at_this_crash
    echo "until_done.sh: exit code $code; resuming from ${at_this_crash:-the start}" >&2
    ATTEMPT=$((ATTEMPT + 1))
    sleep "${RETRY_SECONDS:-10}"
done
