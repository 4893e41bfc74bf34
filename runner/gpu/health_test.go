package gpu

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

const kmsg = "6,1,2,-;nothing\n" +
	"4,1023,99,-;NVRM: Xid (PCI:0000:65:00): 31, pid=12, name=a.out, Ch 00000008\n" +
	"4,1024,100,-;NVRM: Xid (PCI:0000:65:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.\n"

func TestParseXid(t *testing.T) {
	for _, c := range []struct {
		line, pci string
		code      int
		what      string
		ok        bool
	}{
		{"4,1,1,-;NVRM: Xid (PCI:0000:65:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.", "0000:65:00", 79, "GPU has fallen off the bus.", true},
		{"NVRM: Xid (PCI:0000:65:00): 48, An uncorrectable double bit error (DBE) has been detected", "0000:65:00", 48, "An uncorrectable double bit error (DBE) has been detected", true},
		{"NVRM: Xid (PCI:0000:65:00): many", "", 0, "", false},
		{"NVRM: Xid (PCI:../..): 79, x", "", 0, "", false},
		{"usb 1-1: new device", "", 0, "", false},
	} {
		pci, code, what, ok := parseXid(c.line)
		if pci != c.pci || code != c.code || what != c.what || ok != c.ok {
			t.Errorf("parseXid(%q) = %q, %d, %q, %v, want %q, %d, %q, %v", c.line, pci, code, what, ok, c.pci, c.code, c.what, c.ok)
		}
	}
}

var (
	h100 = Device{Maker: NVIDIA, UUID: "GPU-aaaa", Model: "NVIDIA H100", MemoryMB: 81559, PCI: "0000:65:00.0"}
	part = Device{Maker: NVIDIA, UUID: "MIG-1", Parent: "GPU-aaaa", Slice: &MIG{}, MemoryMB: 10240}
)

// TestCheck has a machine whose nvidia-smi says what two files hold.
func TestCheck(t *testing.T) {
	for _, c := range []struct {
		name, mem, apps string
		d               Device
		want            string // "" for well
	}{
		{"well", "GPU-aaaa, 4\nGPU-bbbb, 70000\n", "GPU-bbbb, 1, python\n", h100, ""},
		{"driver's own", "GPU-aaaa, 4000\n", "", h100, ""},
		{"no number", "GPU-aaaa, [N/A]\n", "", h100, ""},
		{"memory", "GPU-aaaa, 4500\n", "", h100, "GPU-aaaa: 4500 MiB in use without a job"},
		{"process", "GPU-aaaa, 4\n", "GPU-aaaa, 4711, /usr/bin/python3\n", h100, "GPU-aaaa: process 4711 (python3) still uses it"},
		{"mps", "GPU-aaaa, 4\n", "GPU-aaaa, 4711, nvidia-cuda-mps-server\n", h100, ""},
		{"gone", "GPU-bbbb, 4\n", "", h100, "GPU-aaaa: nvidia-smi no longer lists it"},
		{"slice beside a busy one", "GPU-aaaa, 50000\n", "GPU-aaaa, 1, x\nMIG-2, 1, x\n", part, ""},
		{"slice", "GPU-aaaa, 4\n", "MIG-1, 12, x\n", part, "MIG-1: process 12 (x) still uses it"},
	} {
		dir := t.TempDir()
		write(t, dir, map[string]string{"mem": c.mem, "apps": c.apps})
		fake(t, "case $1 in --query-gpu=*) cat "+dir+"/mem;; *) cat "+dir+"/apps;; esac\n")
		m := newMonitor(dir, []Device{c.d})
		m.settle = time.Millisecond
		err := m.Check(t.Context())
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.HasPrefix(err.Error(), c.want)) {
			t.Errorf("%s: Check() = %v, want %q", c.name, err, c.want)
		}
	}
}

// A job that was just killed has a moment until its GPU must be free.
func TestCheckWaitsForTheDying(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, map[string]string{"apps": "GPU-aaaa, 1, x\n"})
	fake(t, "case $1 in --query-gpu=*) echo GPU-aaaa, 4;; *) cat "+dir+"/apps; : >"+dir+"/apps;; esac\n")
	m := newMonitor(dir, []Device{h100})
	m.settle = time.Millisecond
	if err := m.Check(t.Context()); err != nil {
		t.Errorf("Check() = %v, want it to ask again", err)
	}
}

func TestCheckSaysWhatTheToolSays(t *testing.T) {
	fake(t, "echo 'Unable to determine the device handle for GPU 0000:65:00.0: GPU is lost.'; echo 'Reboot the system'; exit 15\n")
	err := newMonitor(t.TempDir(), []Device{h100}).Check(t.Context())
	if err == nil || !strings.Contains(err.Error(), "GPU is lost. Reboot") {
		t.Errorf("Check() = %v, want the tool's words on one line", err)
	}
}

func TestCheckAMD(t *testing.T) {
	fakeTool(t, "rocm-smi", "cat <<'X'\n"+rocm+"\nX\n")
	for _, c := range []struct {
		d    Device
		want string
	}{
		{mi250, ""},
		{w7800, "AMD-0000-c6-00-0: 1024 MiB in use"},
		{Device{Maker: AMD, UUID: "GPU-1"}, "GPU-1: rocm-smi no longer lists it"},
	} {
		m := newMonitor(t.TempDir(), []Device{c.d})
		m.settle = time.Millisecond
		err := m.Check(t.Context())
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.HasPrefix(err.Error(), c.want)) {
			t.Errorf("Check(%s) = %v, want %q", c.d.UUID, err, c.want)
		}
	}
}

// TestXids writes to a kernel's log that is a file.
func TestXids(t *testing.T) {
	fake(t, "case $1 in --query-gpu=*) echo GPU-aaaa, 4;; esac\n")
	root := t.TempDir()
	write(t, root, map[string]string{"dev/kmsg": kmsg})
	m := newMonitor(root, []Device{h100})
	defer m.Close()
	if err := m.Check(t.Context()); err != nil {
		t.Fatalf("Check() = %v; what was there before is old news", err)
	}
	log, err := os.OpenFile(filepath.Join(root, "dev/kmsg"), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	for _, c := range []struct{ line, want string }{
		{"4,1,1,-;NVRM: Xid (PCI:0000:65:00): 31, pid=1, name=x, a program's own\n", ""},
		{"4,1,1,-;NVRM: Xid (PCI:0000:b1:00): 79, another GPU's\n", ""},
		{kmsg, "GPU-aaaa: Xid 79: GPU has fallen off the bus."},
		{"", ""}, // once
	} {
		if _, err := log.WriteString(c.line); err != nil {
			t.Fatal(err)
		}
		err := m.Check(t.Context())
		if err == nil {
			err = errors.New("")
		}
		if err.Error() != c.want {
			t.Errorf("Check() after %q = %q, want %q", c.line, err, c.want)
		}
	}
}

// TestMissing has a driver in /proc that lost a GPU, and one whose node is not there.
func TestMissing(t *testing.T) {
	fake(t, "case $1 in --query-gpu=*) echo GPU-aaaa, 4;; esac\n")
	root := t.TempDir()
	check := func(want string) {
		t.Helper()
		err := newMonitor(root, []Device{h100}).Check(t.Context())
		if want == "" && err != nil || want != "" && (err == nil || err.Error() != want) {
			t.Errorf("Check() = %v, want %q", err, want)
		}
	}
	check("") // no driver to ask
	write(t, root, map[string]string{"proc/driver/nvidia/gpus/0000:01:00.0/information": ""})
	check("GPU-aaaa: the driver no longer has it")
	write(t, root, map[string]string{"proc/driver/nvidia/gpus/0000:65:00.0/information": "", "dev/nvidiactl": ""})
	check("GPU-aaaa: /dev/nvidia0 is missing")
	write(t, root, map[string]string{"dev/nvidia0": ""})
	check("")
}
