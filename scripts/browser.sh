#!/usr/bin/env bash
# A headless Chromium for the tests marked `browser`, which are deselected without one. Installs it where this is CI, root
# and Debian; elsewhere it says what to install. Doing it twice does nothing.
set -euo pipefail
packages="chromium-headless-shell fonts-dejavu-core"
for name in chromium-headless-shell chromium chromium-browser google-chrome; do
  if command -v "$name" >/dev/null; then exit 0; fi
done
if [[ "${CI:-}" == true && "$EUID" == 0 ]] && command -v apt-get >/dev/null; then
  # shellcheck disable=SC2086  # split on purpose
  if { timeout 60 apt-get update -q &&
    DEBIAN_FRONTEND=noninteractive timeout 120 apt-get install -qy --no-install-recommends $packages; } \
    </dev/null >/dev/null 2>&1; then exit 0; fi
fi
printf 'browser: no Chromium here, so the browser tests are left out; apt-get install %s\n' "$packages" >&2
