package bwrap

import (
	"context"
	"encoding/binary"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"github.com/rai-project/raid/runner/gpu"
)

// host makes a small root folder: names ending in "/" are folders, "a->b" are links.
func host(t *testing.T, names ...string) string {
	t.Helper()
	root := t.TempDir()
	for _, n := range names {
		name, to, link := strings.Cut(n, "->")
		path := filepath.Join(root, name)
		err := os.MkdirAll(filepath.Dir(path), 0o755)
		switch {
		case err != nil:
		case link:
			err = os.Symlink(to, path)
		case strings.HasSuffix(n, "/"):
			err = os.MkdirAll(path, 0o755)
		default:
			err = os.WriteFile(path, nil, 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return root
}

// text is bwrap's arguments in one line, root spelled as @.
func text(root string, args []string) string {
	return strings.ReplaceAll(strings.Join(args, " "), root, "@")
}

func TestHostArgs(t *testing.T) {
	root := host(t, "usr/bin/", "bin->usr/bin", "lib64/", "sbin", "opt/cuda-12/", "opt/secret/", "opt/rocm->rocm-6", "opt/rocm-6/")
	want := "--ro-bind @/usr /usr --symlink usr/bin /bin --ro-bind @/lib64 /lib64" +
		" --ro-bind @/opt/cuda-12 /opt/cuda-12 --symlink rocm-6 /opt/rocm --ro-bind @/opt/rocm-6 /opt/rocm-6"
	if got := text(root, hostArgs(root)); got != want {
		t.Errorf("hostArgs = %s\nwant %s", got, want)
	}
}

func TestImageArgs(t *testing.T) {
	root := host(t, "usr/", "bin->usr/bin", "etc/passwd", "etc/resolv.conf->/run/x", "opt/tool/", "home/x/", "proc/", "tmp/", "var/lib/", "var/tmp/", "run/")
	want := "--symlink usr/bin /bin --ro-bind @/etc /etc --ro-bind @/opt /opt --ro-bind @/usr /usr" +
		" --ro-bind @/var/lib /var/lib --ro-bind E/passwd /etc/passwd"
	a, err := imageArgs(root, "E")
	if got := text(root, a); err != nil || got != want {
		t.Errorf("imageArgs = %s, %v\nwant %s", got, err, want)
	}
	if _, err := imageArgs(filepath.Join(root, "none"), "E"); err == nil {
		t.Error("imageArgs of a missing folder: no error")
	}
}

func TestGPUArgs(t *testing.T) {
	caps := "proc/driver/nvidia/capabilities/gpu3/mig/"
	root := host(t, "sys/devices/pci0000:00/0000:65:00.0/", "sys/bus/pci/devices/0000:65:00.0->../../../devices/pci0000:00/0000:65:00.0",
		caps+"gi1/access", caps+"gi1/ci0/access", "proc/driver/nvidia/capabilities/gpu4/mig/gi1/access")
	for file, minor := range map[string]string{caps + "gi1/access": "30", caps + "gi1/ci0/access": "31"} {
		if err := os.WriteFile(filepath.Join(root, file), []byte("DeviceFileMinor: "+minor+"\nDeviceFileMode: 292\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got := gpuArgs(root, []gpu.Device{{Index: 0, Minor: 3, PCI: "0000:65:00.0"}})
	var nodes []string
	for i, a := range got {
		if a == "--dev-bind-try" {
			nodes = append(nodes, got[i+2])
		}
	}
	want := []string{"/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia-uvm-tools", "/dev/nvidia-modeset", "/dev/nvidia3",
		"/dev/nvidia-caps/nvidia-cap30", "/dev/nvidia-caps/nvidia-cap31"}
	if !slices.Equal(nodes, want) {
		t.Errorf("nodes %v, want %v", nodes, want)
	}
	pci := "--ro-bind @/sys/devices/pci0000:00/0000:65:00.0 /sys/devices/pci0000:00/0000:65:00.0" +
		" --symlink ../../../../sys/devices/pci0000:00/0000:65:00.0 /sys/bus/pci/devices/0000:65:00.0"
	if !strings.HasSuffix(text(root, got), pci) {
		t.Errorf("gpuArgs = %s\nwant it to end in %s", text(root, got), pci)
	}
	if got := gpuArgs("/", nil); got != nil {
		t.Errorf("gpuArgs without GPUs = %v, want none", got)
	}
}

func TestWriteEtc(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "etc")
	for range 2 { // again, over what is there
		if err := writeEtc(dir); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"shadow", "gshadow", "sudoers", "ssh", "ssl/private"} {
		if _, err := os.Lstat(filepath.Join(dir, name)); err == nil {
			t.Errorf("%s was copied", name)
		}
	}
	if b, err := os.ReadFile(filepath.Join(dir, "passwd")); err != nil || !strings.Contains(string(b), "\nrai:x:1000:1000:") || strings.Count(string(b), "\n") != 3 {
		t.Errorf("passwd = %q, %v", b, err)
	}
}

func TestUsed(t *testing.T) {
	root := host(t, "a/b/", "c->/usr")
	if err := os.WriteFile(filepath.Join(root, "a", "f"), make([]byte, 1<<20), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Link(filepath.Join(root, "a", "f"), filepath.Join(root, "a", "b", "g")); err != nil {
		t.Fatal(err)
	}
	sparse := filepath.Join(root, "sparse")
	if err := os.WriteFile(sparse, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(sparse, 1<<40); err != nil {
		t.Fatal(err)
	}
	if n := used(context.Background(), root, 1<<40); n < 1<<20 || n > 1<<20+64<<10 {
		t.Errorf("used = %d, want 1 MiB and a little: links, holes and the outside count nothing", n)
	}
	deep := strings.Repeat("d/", maxDepth+10)
	if err := os.MkdirAll(filepath.Join(root, deep), 0o755); err != nil {
		t.Fatal(err)
	}
	if n := used(context.Background(), root, 1<<40); n <= 1<<40 {
		t.Errorf("used = %d for a tree of %d levels, want over the limit", n, maxDepth+10)
	}
}

func TestExplain(t *testing.T) {
	for _, c := range []struct{ text, want string }{
		{"bwrap: setting up uid map: Permission denied\n", "apparmor_parser"},
		{"bwrap: loopback: Failed RTM_NEWADDR: Operation not permitted", "apparmor_parser"},
		{"bwrap: No permissions to creating new namespace, likely because…", "sysctl"},
		{"bwrap: Can't mount proc on /newroot/proc: Operation not permitted", "--privileged"},
		{"bwrap: Can't find source path /root/x: Permission denied", "chmod o+x"},
		{"something else", "something else"},
		{"", "without a word"},
	} {
		if got := explain(c.text); !strings.Contains(got, c.want) {
			t.Errorf("explain(%q) = %q, want %q in it", c.text, got, c.want)
		}
	}
}

func TestWeakness(t *testing.T) {
	for _, c := range []struct {
		missing  []string
		sameUser bool
		disk     error
		want     string
	}{
		{nil, false, nil, ""},
		{controllers[:], true, nil, "memory, pids and CPU limits are not enforced: not root and no delegated cgroup; jobs run as the runner's own user"},
		{controllers[2:], false, os.ErrPermission, "CPU limits are not enforced: no usable cgroup; the disk limit is only measured every 2s: permission denied"},
	} {
		if got := weakness(c.missing, c.sameUser, c.disk); got != c.want {
			t.Errorf("weakness(%v, %v, %v) = %q, want %q", c.missing, c.sameUser, c.disk, got, c.want)
		}
	}
}

func TestTail(t *testing.T) {
	var b tail
	b.Write([]byte("first"))
	b.Write(make([]byte, 3*tailSize))
	b.Write([]byte("last"))
	if got := b.String(); len(got) != tailSize || !strings.HasSuffix(got, "\x00last") {
		t.Errorf("tail holds %d bytes ending in %q, want %d and last", len(got), got[len(got)-5:], tailSize)
	}
}

// TestFilter runs the filter on calls that a box cannot be made to do.
func TestFilter(t *testing.T) {
	raw, err := seccompFilter()
	if err != nil {
		t.Fatal(err)
	}
	var prog []bpf.Instruction
	for ; len(raw) > 0; raw = raw[8:] {
		prog = append(prog, bpf.RawInstruction{Op: binary.NativeEndian.Uint16(raw), Jt: raw[2], Jf: raw[3], K: binary.NativeEndian.Uint32(raw[4:])}.Disassemble())
	}
	vm, err := bpf.NewVM(prog)
	if err != nil {
		t.Fatal(err)
	}
	const (
		eperm  = unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)
		enosys = unix.SECCOMP_RET_ERRNO | uint32(unix.ENOSYS)
		noFam  = unix.SECCOMP_RET_ERRNO | uint32(unix.EAFNOSUPPORT)
		ok     = unix.SECCOMP_RET_ALLOW
	)
	here := auditArch[runtime.GOARCH]
	for _, c := range []struct {
		name     string
		arch, nr uint32
		args     []uint32
		want     uint32
	}{
		{"read", here, unix.SYS_READ, nil, ok},
		{"ptrace", here, unix.SYS_PTRACE, nil, ok},
		{"i386 anything", unix.AUDIT_ARCH_I386, 1, nil, unix.SECCOMP_RET_KILL_PROCESS},
		{"mount", here, unix.SYS_MOUNT, nil, eperm},
		{"last of the list", here, unix.SYS_ADJTIMEX, nil, eperm},
		{"clone3", here, unix.SYS_CLONE3, nil, enosys},
		{"open_tree_attr", here, 467, nil, enosys},
		{"fork", here, unix.SYS_CLONE, []uint32{uint32(unix.SIGCHLD)}, ok},
		{"thread", here, unix.SYS_CLONE, []uint32{unix.CLONE_VM | unix.CLONE_THREAD | unix.CLONE_SIGHAND}, ok},
		{"new pid namespace", here, unix.SYS_CLONE, []uint32{unix.CLONE_NEWPID}, eperm},
		{"unix socket", here, unix.SYS_SOCKET, []uint32{unix.AF_UNIX, 1, 0}, ok},
		{"inet6 socket", here, unix.SYS_SOCKET, []uint32{unix.AF_INET6, 1, 0}, ok},
		{"route socket", here, unix.SYS_SOCKET, []uint32{unix.AF_NETLINK, 3, 0}, ok},
		{"kobject socket", here, unix.SYS_SOCKET, []uint32{unix.AF_NETLINK, 3, unix.NETLINK_KOBJECT_UEVENT}, noFam},
		{"packet socket", here, unix.SYS_SOCKET, []uint32{unix.AF_PACKET, 3, 0}, noFam},
		{"tipc pair", here, unix.SYS_SOCKETPAIR, []uint32{unix.AF_TIPC, 1, 0}, noFam},
		{"gdb", here, unix.SYS_PERSONALITY, []uint32{0x0040000}, ok},
		{"mmap zero", here, unix.SYS_PERSONALITY, []uint32{0x0100000}, eperm},
		{"winsize", here, unix.SYS_IOCTL, []uint32{0, unix.TIOCGWINSZ}, ok},
		{"sti", here, unix.SYS_IOCTL, []uint32{0, unix.TIOCSTI}, eperm},
		{"linux", here, unix.SYS_IOCTL, []uint32{0, tioclinux}, eperm},
	} {
		// The VM reads big endian, the kernel native: so each word is laid out for it.
		b := make([]byte, 64)
		binary.BigEndian.PutUint32(b[offNr:], c.nr)
		binary.BigEndian.PutUint32(b[offArch:], c.arch)
		for i, a := range c.args {
			binary.BigEndian.PutUint32(b[offArgs+8*i:], a)
		}
		if got, err := vm.Run(b); err != nil || uint32(got) != c.want {
			t.Errorf("%s: %#x, %v, want %#x", c.name, got, err, c.want)
		}
	}
	if runtime.GOARCH == "amd64" {
		b := make([]byte, 64)
		binary.BigEndian.PutUint32(b[offNr:], 0x40000000) // x32's read
		binary.BigEndian.PutUint32(b[offArch:], here)
		if got, _ := vm.Run(b); uint32(got) != enosys {
			t.Errorf("x32: %#x, want %#x", got, enosys)
		}
	}
}

func TestBoxOf(t *testing.T) {
	for _, c := range []struct {
		cmdline, want string
		ok            bool
	}{
		{"/usr/bin/bwrap\x00--bind\x00/run/boxes/b1/disk/src\x00/src\x00", "b1", true},
		{"/usr/bin/bwrap\x00--bind\x00/run/boxes2/b1/disk/src\x00", "", false},
		{"/bin/vi\x00/run/boxes/b1/disk/src\x00", "", false},
		{"", "", false},
	} {
		if got, ok := boxOf(c.cmdline, "/usr/bin/bwrap", "/run/boxes"); got != c.want || ok != c.ok {
			t.Errorf("boxOf(%q) = %q, %v, want %q, %v", c.cmdline, got, ok, c.want, c.ok)
		}
	}
}
