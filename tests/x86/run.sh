#!/usr/bin/env bash
# The kernels of an instruction set that this machine lacks: their tests and the reference cases on an x86 processor
# that Bochs emulates, under a Linux that holds nothing else. Two to three minutes, on a Debian.
#
#   tests/x86/run.sh BOCHS corei7_icelake_u Avx512
#   tests/x86/run.sh BOCHS arrow_lake AvxVnni
#
# BOCHS: the folder `bochs` of its sources (github.com/bochs-emu/Bochs), made by
#   ./configure --enable-x86-64 --enable-avx --enable-evex --enable-all-optimizations --with-nogui --disable-plugins
#   make
# Debian's own package knows neither AVX nor AVX-512. Then the processor, as `bochs --help cpu` names them, and the set
# whose kernels must have run.
#
# Debian packages: grub-common grub-pc-bin xorriso; and Rust. 30 MB are fetched beside them.
set -euo pipefail
(($# == 3)) || { echo "usage: tests/x86/run.sh BOCHS PROCESSOR LEVEL"; exit 2; }
root=$(cd "$(dirname "$0")/../.." && pwd)
bochs=$(cd "$1" && pwd) processor=$2 level=$3
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

echo "--- a Linux, and a shell that needs no library"
kernel=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/.*Depends: \(linux-image-[0-9].*\)/\1/p')
(cd "$work" && apt-get download "$kernel" busybox-static)
for package in "$work"/*.deb; do dpkg -x "$package" "$work/linux"; done

echo "--- the tests"
cd "$root"
disk=$work/disk
mkdir -p "$disk"/{bin,dev,proc,sys,tmp,programs,mor/tests}
report=$(cargo test --release --lib --test reference --no-run 2>&1) || { echo "$report"; exit 1; }
while read -r program; do
    strip -o "$disk/programs/$(basename "$program")" "$program"
    # The libraries, where the program looks for them.
    ldd "$program" | grep -o '/lib[^ ]*' | while read -r library; do
        mkdir -p "$disk$(dirname "$library")"
        cp -L "$library" "$disk$library"
    done
done < <(sed -n 's/.*Executable .*(\(.*\))$/\1/p' <<<"$report")
(($(find "$disk/programs" -type f | wc -l) == 2))
cp -r tests/cases tests/shapes "$disk/mor/tests"
cp "$work/linux/bin/busybox" "$disk/bin"
cat >"$disk/init" <<'INIT'
#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
exec >/dev/ttyS0 2>&1 </dev/null
/bin/busybox grep -m 1 "model name" /proc/cpuinfo
export MOR_TEST_ROOT=/mor
run() {
    "$@" --nocapture --test-threads 1
    echo "ended with $?: $1"
}
run /programs/mor-* cpu::
run /programs/reference-*
# What was written last is to leave the port before the power goes.
/bin/busybox sleep 1
/bin/busybox poweroff -f
INIT
chmod +x "$disk/init"
mkdir -p "$work/cd/boot/grub"
(cd "$disk" && find . | "$work/linux/bin/busybox" cpio -o -H newc 2>/dev/null) >"$work/cd/boot/disk"
cp "$work"/linux/boot/vmlinuz-* "$work/cd/boot/linux"
# Bochs repeats string instructions wrongly where the processor says that they are fast; so it does not say so.
cat >"$work/cd/boot/grub/grub.cfg" <<'GRUB'
set timeout=0
menuentry tests {
    linux /boot/linux console=ttyS0 quiet tsc=reliable mitigations=off clearcpuid=112,297,580
    initrd /boot/disk
}
GRUB
grub-mkrescue -o "$work/cd.iso" "$work/cd" >"$work/grub.log" 2>&1 || { cat "$work/grub.log"; exit 1; }

echo "--- on $processor"
cat >"$work/bochsrc" <<BOCHS
megs: 512
cpu: model=$processor, ips=100000000
romimage: file=$bochs/bios/BIOS-bochs-latest
vgaromimage: file=$bochs/bios/VGABIOS-lgpl/VGABIOS-lgpl-latest.bin
ata0-master: type=cdrom, path=$work/cd.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev=$work/serial
display_library: nogui
clock: sync=none
panic: action=fatal
log: $work/bochs.log
BOCHS
# It ends with 1 when the machine is switched off.
timeout 1800 "$bochs/bochs" -q -f "$work/bochsrc" >"$work/bochs.out" 2>&1 </dev/null || true
touch "$work/serial" "$work/bochs.log" # not there if nothing came
sed -n '/^model name/,$p' "$work/serial" | tee "$work/ran"
(($(grep -c '^ended with 0: ' "$work/ran") == 2)) ||
    { tail -qn 20 "$work/bochs.out" "$work/bochs.log" "$work/serial"; exit 1; }
grep -q "kernels tested: \[.*, $level\]" "$work/ran"
grep -q "attention tested: \[.*, $level\]" "$work/ran"
echo "the kernels of $level equal the oracle on $processor, and the reference cases pass"
