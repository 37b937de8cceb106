#!/usr/bin/env bash
# Builds the Dockerfile and runs the image, without a Docker daemon: mmdebstrap
# makes a Debian base, buildah builds over it with chroot isolation. Needs root,
# mmdebstrap, buildah and Python with pip; ends with status 0 when the image
# works. pip's settings of this machine (index, find-links, certificates) hold in
# the build, and aren't kept in the image.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
suite=bookworm # the oldest Debian whose Python (3.11) Helios supports
base=localhost/helios-base
image=localhost/helios
build_limit_s=900
run_limit_s=120

for command in mmdebstrap buildah; do
  command -v "$command" >/dev/null || {
    echo "container-check: '$command' is missing: apt-get install mmdebstrap buildah" >&2
    exit 1
  }
done
if [ "$(id -u)" -ne 0 ]; then
  echo "container-check: must run as root (mmdebstrap and chroot isolation)" >&2
  exit 1
fi

python=$root/.venv/bin/python
[ -x "$python" ] || python=python3

work=$(mktemp -d)
export TMPDIR=$work
started_s=$SECONDS

buildah_() {
  local limit_s=$1
  shift
  timeout --kill-after=20 "$limit_s" buildah --storage-driver vfs \
    --root "$work/storage" --runroot "$work/run" "$@"
}

clean_up() {
  status=$?
  buildah_ 60 rm --all >/dev/null 2>&1 || true
  rm -rf --one-file-system "$work"
  [ "$status" -eq 0 ] || echo "container-check: FAILED (status $status)" >&2
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

say() { printf '%4d s  %s\n' $((SECONDS - started_s)) "$*"; }

# --- pip's settings ---------------------------------------------------------
# Writes pip.conf with every setting in force, from files and the environment,
# and `mounts` with the local paths that they name.
"$python" - "$work" <<'PYTHON'
import ast, configparser, os, pathlib, re, subprocess, sys

work = pathlib.Path(sys.argv[1])
listed = subprocess.run(
    [sys.executable, "-m", "pip", "config", "list"],
    check=True, capture_output=True, text=True,
).stdout
config = configparser.RawConfigParser()
config.add_section("global")
for line in sorted(listed.splitlines(), key=lambda line: line.startswith(":env:")):
    name, _, value = line.partition("=")  # the environment last: it wins
    section, _, key = name.rpartition(".")
    section = "global" if section == ":env:" else section
    if not config.has_section(section):
        config.add_section(section)
    config.set(section, key, ast.literal_eval(value).replace("\n", "\n  "))
if not config.has_option("global", "cert"):
    for variable in ("REQUESTS_CA_BUNDLE", "SSL_CERT_FILE", "CURL_CA_BUNDLE"):
        if os.path.isfile(os.environ.get(variable, "")):
            config.set("global", "cert", os.environ[variable])
            break
with open(work / "pip.conf", "w") as file:
    config.write(file)

paths = set()
for section in config.sections():
    for key, value in config.items(section):
        for word in re.split(r"[\s,]+", value):
            path = pathlib.Path(word.removeprefix("file://"))
            if not path.is_absolute() or not path.exists():
                continue
            # An index's pages may link to files beside it: its parent, then.
            is_index = key in ("index-url", "extra-index-url")
            paths.add(path.parent if is_index and path.parent != path.root else path)
(work / "mounts").write_text("".join(f"{path}\n" for path in sorted(paths)))
PYTHON
volumes=(--volume "$work/pip.conf:/etc/pip.conf:ro")
while read -r path; do
  volumes+=(--volume "$path:$path:ro")
done <"$work/mounts"

# --- the base ----------------------------------------------------------------
# Debian's sources as this machine has them; mmdebstrap's own, if it has none.
mirror=()
if apt-get indextargets --format 'deb $(REPO_URI) $(RELEASE) $(COMPONENT)' \
  'Created-By: Packages' 'Origin: Debian' |
  grep -E " $suite(-updates|-security)? " | sort -u >"$work/sources.list"; then
  mirror=("$work/sources.list")
fi
timeout --kill-after=20 "$build_limit_s" mmdebstrap --quiet --mode=root \
  --variant=minbase --include=ca-certificates,python3,python3-venv \
  "$suite" "$work/base.tar" "${mirror[@]}"
say "base made ($suite, $(du -m "$work/base.tar" | cut -f1) MB)"

container=$(buildah_ 60 from scratch)
buildah_ 300 add --quiet "$container" "$work/base.tar" / >/dev/null
rm "$work/base.tar"
buildah_ 300 commit --quiet --rm "$container" "$base" >/dev/null
say "base imported"

# --- the image ---------------------------------------------------------------
buildah_ "$build_limit_s" build --quiet --isolation chroot --pull-never \
  --build-arg BASE_IMAGE="$base" "${volumes[@]}" --tag "$image" "$root" \
  >"$work/build.log" 2>&1 || {
  cat "$work/build.log" >&2
  exit 1
}
say "image built"

# --- running it --------------------------------------------------------------
container=$(buildah_ 300 from --pull-never "$image")
buildah_ 60 inspect --type image "$image" >"$work/image.json"
words_of() { # words_of KEY: one a line
  "$python" -c '
import json, sys
config = json.load(open(sys.argv[1]))["OCIv1"]["config"]
print(*config[sys.argv[2]], sep="\n")' "$work/image.json" "$1"
}
mapfile -t entrypoint < <(words_of Entrypoint)
mapfile -t command < <(words_of Cmd)
in_image() {
  buildah_ "$run_limit_s" run --isolation chroot --env TINI_SUBREAPER=1 \
    "$container" -- "$@"
}
expect() { # expect WHAT RECEIVED EXPECTED
  [ "$2" = "$3" ] || {
    echo "container-check: $1: got '$2', expected '$3'" >&2
    exit 1
  }
}

echo "--- ${entrypoint[*]} ${command[*]}"
in_image "${entrypoint[@]}" "${command[@]}"
echo "---"
say "the default command runs"

expect "default command" "${command[*]}" "helios env"
expect "user" "$(in_image id -un)" "helios"
expect "folder" "$(in_image pwd)" "/work"
in_image touch /work/writable
expect "pip's settings kept in the image" \
  "$(in_image sh -c 'cat /etc/pip.conf 2>/dev/null || true')" ""
say "the user is not root, and the folder is writable"

# SIGTERM sent to the init reaches the command, and not the command's own
# children. The driver starts the image's entry point inside the container.
cat >"$work/signals.py" <<'PYTHON'
import signal, subprocess, sys, textwrap

CHILD = textwrap.dedent("""
    import signal, subprocess, sys

    worker = subprocess.Popen(["sleep", "60"])
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    print("ready", flush=True)
    signal.sigwait([signal.SIGTERM])
    try:
        worker.wait(timeout=1)
        sys.exit("the worker was ended too")
    except subprocess.TimeoutExpired:
        worker.kill()
""")
init = subprocess.Popen(
    [*sys.argv[1:], "python", "-c", CHILD], stdout=subprocess.PIPE, text=True
)
assert init.stdout is not None
assert init.stdout.readline() == "ready\n"
init.send_signal(signal.SIGTERM)
sys.exit(init.wait(timeout=30))
PYTHON
in_image python -c "$(cat "$work/signals.py")" "${entrypoint[@]}"
say "SIGTERM sent to the init reaches the command, and only it"
say "container-check: passed"
