#!/bin/sh
# redis whose port opens when its data is there, so that an accepted connection means that it can answer.
# usage: start.sh PORT
set -eu
socket=/tmp/redis.sock

ask() { redis-cli -s "$socket" "$@" >/dev/null 2>&1; }

load() {
  until ask ping; do sleep 0.005; done
  ask set token "$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')"
  ask --eval /opt/cache/load.lua
  exec redis-cli -s "$socket" config set port "$1"
}

# A grandchild: the sandbox's PID 1 reaps it, redis would not.
(load "$1" &)
exec redis-server --port 0 --unixsocket "$socket" --bind 0.0.0.0 --protected-mode no --save "" --appendonly no --dir /tmp
