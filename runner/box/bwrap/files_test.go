package bwrap

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

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

func TestDriverArgs(t *testing.T) {
	got := strings.Join(driverArgs([]gpu.File{{Name: "libcuda.so.1", Path: "/usr/lib/libcuda.so.550.1"}, {Name: "nvidia-smi", Path: "/usr/bin/nvidia-smi", Tool: true}}), " ")
	want := "--ro-bind-try /usr/lib/libcuda.so.550.1 /.raid/nvidia/lib/libcuda.so.1 --ro-bind-try /usr/bin/nvidia-smi /.raid/nvidia/bin/nvidia-smi"
	if got != want {
		t.Errorf("driverArgs = %s\nwant %s", got, want)
	}
}

// TestGPUArgsOfSlices has two slices of one GPU, and a GPU of another maker.
func TestGPUArgsOfSlices(t *testing.T) {
	root := host(t, "sys/devices/pci0000:00/0000:65:00.0/", "sys/bus/pci/devices/0000:65:00.0->../../../devices/pci0000:00/0000:65:00.0")
	two := text(root, gpuArgs(root, []gpu.Device{{PCI: "0000:65:00.0", Slice: &gpu.MIG{}}, {PCI: "0000:65:00.0", Slice: &gpu.MIG{GI: 1}}}))
	if n := strings.Count(two, "--symlink"); n != 1 {
		t.Errorf("%d links to the address of one GPU, want 1: %s", n, two)
	}
	amd := text(root, gpuArgs(root, []gpu.Device{{Maker: gpu.AMD, Minor: 128}}))
	for _, want := range []string{"@/dev/kfd /dev/kfd", "@/dev/dri/renderD128 /dev/dri/renderD128", "--symlink ../../devices/virtual/kfd/kfd /sys/class/kfd/kfd"} {
		if !strings.Contains(amd, want) || strings.Contains(amd, "/dev/nvidia") {
			t.Errorf("gpuArgs = %s, want %s in it, and no node of NVIDIA's", amd, want)
		}
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
