package gpu

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
)

func TestEnvironment(t *testing.T) {
	always := []string{"CUDA_DEVICE_ORDER=PCI_BUS_ID", "NVIDIA_DRIVER_CAPABILITIES=compute,utility"}
	for _, c := range []struct {
		name string
		ds   []Device
		want []string
	}{
		{"none", nil, []string{"CUDA_VISIBLE_DEVICES=", "NVIDIA_VISIBLE_DEVICES=void", "ROCR_VISIBLE_DEVICES=", "HIP_VISIBLE_DEVICES="}},
		{"two", []Device{{UUID: "GPU-a"}, {UUID: "GPU-b"}}, []string{"CUDA_VISIBLE_DEVICES=GPU-a,GPU-b", "NVIDIA_VISIBLE_DEVICES=GPU-a,GPU-b", "HIP_VISIBLE_DEVICES="}},
		{"slice", []Device{{UUID: "MIG-a", Slice: &MIG{}}}, []string{"CUDA_VISIBLE_DEVICES=MIG-a", "NVIDIA_VISIBLE_DEVICES=MIG-a"}},
		{"cut", []Device{{UUID: "GPU-a", MIG: []MIG{{UUID: "MIG-a"}, {UUID: "MIG-b"}}}}, []string{"CUDA_VISIBLE_DEVICES=MIG-a,MIG-b"}},
		{"amd", []Device{mi250}, []string{"CUDA_VISIBLE_DEVICES=", "NVIDIA_VISIBLE_DEVICES=void", "ROCR_VISIBLE_DEVICES=" + mi250.UUID, "HIP_VISIBLE_DEVICES=0"}},
		{"amd, no number", []Device{mi250, w7800}, []string{"ROCR_VISIBLE_DEVICES=0,1", "HIP_VISIBLE_DEVICES=0,1"}},
	} {
		got := strings.Join(Environment(c.ds), "\n") + "\n"
		for _, want := range append(c.want, always...) {
			if !strings.Contains("\n"+got, "\n"+want+"\n") {
				t.Errorf("%s: Environment = %q, want %s in it", c.name, got, want)
			}
		}
	}
}

// write makes files below dir.
func write(t *testing.T, dir string, files map[string]string) {
	t.Helper()
	for name, text := range files {
		p := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

func TestNodes(t *testing.T) {
	root := t.TempDir()
	caps := "proc/driver/nvidia/capabilities/gpu3/mig/"
	write(t, root, map[string]string{
		caps + "gi2/access":     "DeviceFileMinor: 21\nDeviceFileMode: 256\n",
		caps + "gi2/ci1/access": "DeviceFileMinor: 23\n",
		caps + "gi9/access":     "DeviceFileMinor: 84\n",
		caps + "gi9/ci0/access": "DeviceFileMinor: 85\n",
	})
	common := []string{"/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia-uvm-tools", "/dev/nvidia-modeset"}
	for _, c := range []struct {
		name string
		ds   []Device
		want []string
	}{
		{"none", nil, nil},
		{"two", []Device{{Minor: 0}, {Minor: 1}}, append(common[:4:4], "/dev/nvidia0", "/dev/nvidia1")},
		{"slice", []Device{{Minor: 3, Slice: &MIG{GI: 2, CI: 1}}}, append(common[:4:4], "/dev/nvidia3", "/dev/nvidia-caps/nvidia-cap21", "/dev/nvidia-caps/nvidia-cap23")},
		{"whole", []Device{{Minor: 3}}, append(common[:4:4], "/dev/nvidia3", "/dev/nvidia-caps/nvidia-cap21", "/dev/nvidia-caps/nvidia-cap84", "/dev/nvidia-caps/nvidia-cap23", "/dev/nvidia-caps/nvidia-cap85")},
		{"amd", []Device{{Maker: AMD, Minor: 128}, {Maker: AMD, Minor: -1}}, []string{"/dev/kfd", "/dev/dri/renderD128"}},
	} {
		if got := Nodes(root, c.ds); !reflect.DeepEqual(got, c.want) {
			t.Errorf("%s: Nodes = %v, want %v", c.name, got, c.want)
		}
	}
}

func TestRenderMinor(t *testing.T) {
	root := t.TempDir()
	write(t, root, map[string]string{"sys/bus/pci/devices/0000:c1:00.0/drm/renderD129/dev": "226:129\n"})
	for pci, want := range map[string]int{"0000:c1:00.0": 129, "0000:c2:00.0": -1, "": -1} {
		if got := renderMinor(root, pci); got != want {
			t.Errorf("renderMinor(%q) = %d, want %d", pci, got, want)
		}
	}
}

const ldconfigText = `1034 libs found in cache
	libnvidia-ml.so.1 (libc6,x86-64) => /lib/x86_64-linux-gnu/libnvidia-ml.so.1
	libnvidia-ml.so.1 (libc6) => /lib/i386-linux-gnu/libnvidia-ml.so.1
	libcuda.so.1 (libc6,x86-64) => /lib/x86_64-linux-gnu/libcuda.so.1
	libcuda.so (libc6,x86-64) => /lib/x86_64-linux-gnu/libcuda.so
	libcudart.so.12 (libc6,x86-64) => /usr/local/cuda/lib64/libcudart.so.12
	libcurl.so.4 (libc6,x86-64) => /lib/x86_64-linux-gnu/libcurl.so.4
	libcuda.so.2 (libc6,x86-64) => relative
`

func TestParseLdconfig(t *testing.T) {
	want := []File{
		{Name: "libnvidia-ml.so.1", Path: "/lib/x86_64-linux-gnu/libnvidia-ml.so.1"},
		{Name: "libcuda.so.1", Path: "/lib/x86_64-linux-gnu/libcuda.so.1"},
		{Name: "libcuda.so", Path: "/lib/x86_64-linux-gnu/libcuda.so"},
	}
	if got := parseLdconfig(ldconfigText); !reflect.DeepEqual(got, want) {
		t.Errorf("parseLdconfig = %+v, want %+v", got, want)
	}
}

// TestDriver also finds what a fake tool on PATH is a link to.
func TestDriver(t *testing.T) {
	fake(t, "")
	for _, f := range Driver(t.Context()) {
		if f.Name == "nvidia-smi" && strings.HasPrefix(f.Path, os.TempDir()) {
			t.Errorf("Driver gave %+v, which only its owner can reach", f)
		}
	}
	open(t, strings.Split(os.Getenv("PATH"), ":")[0])
	dir := t.TempDir()
	real, err := filepath.EvalSymlinks(strings.Split(os.Getenv("PATH"), ":")[0])
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(filepath.Join(real, "nvidia-smi"), filepath.Join(dir, "nvidia-smi")); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	for _, f := range Driver(t.Context()) {
		if f.Tool && f.Path != filepath.Join(real, "nvidia-smi") && f.Name == "nvidia-smi" {
			t.Errorf("Driver gave %+v, want %s/nvidia-smi", f, real)
		}
		if f.Name == "nvidia-smi" {
			return
		}
	}
	t.Error("Driver gave no nvidia-smi")
}

// TestClaimRace has many who take the same GPU and give it up, so that its lock is
// removed while others open it: it is never two people's.
func TestClaimRace(t *testing.T) {
	dir := t.TempDir()
	var holders atomic.Int32
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 2000 {
				c, err := claim(dir, []Device{{UUID: "GPU-a"}})
				if err != nil {
					continue
				}
				if n := holders.Add(1); n != 1 {
					t.Errorf("%d have it", n)
				}
				os.ReadDir(dir) // takes long enough for the others to try
				holders.Add(-1)
				c.Close()
			}
		})
	}
	wg.Wait()
}

// open lets everybody into a test's folder.
func open(t *testing.T, dir string) {
	t.Helper()
	for ; dir != filepath.Clean(os.TempDir()) && dir != "/"; dir = filepath.Dir(dir) {
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
}

func TestLookAround(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, map[string]string{"libcuda.so.550.1": "", "libcurl.so.4": "", "libcuda.txt": ""})
	want := []File{{Name: "libcuda.so.550.1", Path: filepath.Join(dir, "libcuda.so.550.1")}}
	if got := lookAround([]string{"/nonexistent", dir}); !reflect.DeepEqual(got, want) {
		t.Errorf("lookAround = %+v, want %+v", got, want)
	}
}

const cdiText = `---
cdiVersion: 0.5.0
containerEdits:
  hooks:
  - args:
    - nvidia-cdi-hook
devices:
- containerEdits:
    deviceNodes:
    - path: /dev/nvidia0
  name: "0"
- name: GPU-aaaa
  containerEdits: {}
kind: nvidia.com/gpu
`

func TestAddCDI(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, map[string]string{
		"nvidia.yaml": cdiText,
		"other.json":  `{"kind": "example.com/gpu", "devices": [{"name": "GPU-bbbb"}]}`,
		"broken.json": `{`,
	})
	ds := []Device{{UUID: "GPU-aaaa"}, {UUID: "GPU-bbbb"}, {UUID: "GPU-cccc"}}
	addCDI(ds, dir, filepath.Join(dir, "none"))
	for i, want := range []string{"nvidia.com/gpu=GPU-aaaa", "example.com/gpu=GPU-bbbb", ""} {
		if ds[i].CDI != want {
			t.Errorf("CDI of %s = %q, want %q", ds[i].UUID, ds[i].CDI, want)
		}
	}
}

func TestClaim(t *testing.T) {
	dir := t.TempDir()
	a, b := Device{UUID: "GPU-a"}, Device{UUID: "GPU-b"}
	first, err := claim(dir, []Device{a})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := claim(dir, []Device{b, a}); err == nil || !strings.Contains(err.Error(), "GPU-a: another runner") {
		t.Errorf("claim of a taken one: %v, want it refused", err)
	}
	first.Close()
	second, err := claim(dir, []Device{b, a}) // the refused claim has let go of b
	if err != nil {
		t.Errorf("claim of free ones: %v", err)
	}
	second.Close()
}
