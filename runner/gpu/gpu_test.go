package gpu

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

const (
	query = "1, GPU-bbbb, 00000000:B1:00.0, NVIDIA A40, 46068, 550.54.15\n0, GPU-aaaa, 00000000:65:00.0, NVIDIA H100 80GB HBM3, 81559, 550.54.15\n"
	list  = `GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-aaaa)
  MIG 1g.10gb     Device  0: (UUID: MIG-1111)
  MIG 3g.40gb     Device  1: (UUID: MIG-2222)
GPU 1: NVIDIA A40 (UUID: GPU-bbbb)
`
	instances = `<?xml version="1.0" ?>
<!DOCTYPE nvidia_smi_log SYSTEM "nvsmi_device_v12.dtd">
<nvidia_smi_log>
	<gpu id="00000000:65:00.0"><uuid>GPU-aaaa</uuid>
		<mig_devices>
			<mig_device><index>0</index><gpu_instance_id>9</gpu_instance_id><compute_instance_id>0</compute_instance_id></mig_device>
			<mig_device><index>1</index><gpu_instance_id>2</gpu_instance_id><compute_instance_id>1</compute_instance_id></mig_device>
		</mig_devices>
	</gpu>
	<gpu id="00000000:B1:00.0"><uuid>GPU-bbbb</uuid><mig_devices>None</mig_devices></gpu>
</nvidia_smi_log>
`
	rocm = `WARNING: something
{"card1": {"Device Name": "Instinct", "Unique ID": "N/A", "PCI Bus": "0000:C6:00.0", "Card Series": "AMD Radeon Pro", "VRAM Total Memory (B)": "17163091968", "VRAM Total Used Memory (B)": "1073741824"},
 "card0": {"Unique ID": "0x18F68E602B8A790B", "PCI Bus": "0000:C1:00.0", "Card series": "AMD Instinct MI250", "VRAM Total Memory (B)": "68702699520", "VRAM Total Used Memory (B)": "10960896"},
 "system": {"Driver version": "6.7.0"}}`
)

var (
	mi250 = Device{Maker: AMD, Index: 0, Minor: -1, UUID: "GPU-18f68e602b8a790b", Model: "AMD Instinct MI250", MemoryMB: 65520, Driver: "6.7.0", PCI: "0000:c1:00.0"}
	w7800 = Device{Maker: AMD, Index: 1, Minor: -1, UUID: "AMD-0000-c6-00-0", Model: "AMD Radeon Pro", MemoryMB: 16368, Driver: "6.7.0", PCI: "0000:c6:00.0"}
)

func TestParseQuery(t *testing.T) {
	two := []Device{
		{Maker: NVIDIA, Index: 0, UUID: "GPU-aaaa", Model: "NVIDIA H100 80GB HBM3", MemoryMB: 81559, Driver: "550.54.15", PCI: "0000:65:00.0"},
		{Maker: NVIDIA, Index: 1, Minor: 1, UUID: "GPU-bbbb", Model: "NVIDIA A40", MemoryMB: 46068, Driver: "550.54.15", PCI: "0000:b1:00.0"},
	}
	for _, c := range []struct {
		text string
		want []Device
		ok   bool
	}{
		{query, two, true},
		{"", nil, true},
		{"No devices were found\n", nil, true},
		{"0, GPU-a, [N/A], Odd, name, [N/A], 1.2\n", []Device{{Maker: NVIDIA, UUID: "GPU-a", Model: "Odd, name", Driver: "1.2"}}, true},
		{"x, GPU-a, P, Name, 1, 1.2\n", nil, false},
		{"-1, GPU-a, P, Name, 1, 1.2\n", nil, false},
		{"0, ../../etc, P, Name, 1, 1.2\n", nil, false},
		{"0, GPU-../x, P, Name, 1, 1.2\n", nil, false},
		{"Unable to determine the device handle for GPU0: Unknown Error\n", nil, false},
	} {
		got, err := parseQuery(c.text)
		if !reflect.DeepEqual(got, c.want) || (err == nil) != c.ok {
			t.Errorf("parseQuery(%q) = %v, %v, want %v, ok %v", c.text, got, err, c.want, c.ok)
		}
	}
}

func TestParseList(t *testing.T) {
	want := map[string][]MIG{"GPU-aaaa": {{0, "MIG-1111", "1g.10gb", -1, -1}, {1, "MIG-2222", "3g.40gb", -1, -1}}}
	if got := parseList(list); !reflect.DeepEqual(got, want) {
		t.Errorf("parseList(%q) = %v, want %v", list, got, want)
	}
	for _, text := range []string{"", "MIG 1g Device 0: (UUID: MIG-1)", "GPU 0: X (UUID: ", "GPU", "(UUID: )"} {
		if got := parseList(text); len(got) != 0 {
			t.Errorf("parseList(%q) = %v, want none", text, got)
		}
	}
}

func TestParseInformation(t *testing.T) {
	for _, c := range []struct {
		text  string
		uuid  string
		minor int
		ok    bool
	}{
		{"Model: \t\t NVIDIA A40\nGPU UUID: \t GPU-aaaa\nBus Location: \t 0000:65:00.0\nDevice Minor: \t 3\n", "GPU-aaaa", 3, true},
		{"GPU UUID: GPU-aaaa\n", "GPU-aaaa", -1, false},
		{"Device Minor: x\n", "", -1, false},
	} {
		uuid, minor, ok := parseInformation(c.text)
		if uuid != c.uuid || minor != c.minor || ok != c.ok {
			t.Errorf("parseInformation(%q) = %q, %d, %v, want %q, %d, %v", c.text, uuid, minor, ok, c.uuid, c.minor, c.ok)
		}
	}
}

func TestAddInformation(t *testing.T) {
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "0000:65:00.0"), 0o755); err != nil {
		t.Fatal(err)
	}
	text := "GPU UUID: GPU-bbbb\nDevice Minor: 0\n"
	if err := os.WriteFile(filepath.Join(dir, "0000:65:00.0", "information"), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	ds := []Device{{UUID: "GPU-aaaa", Index: 0, Minor: 0}, {UUID: "GPU-bbbb", Index: 1, Minor: 1}}
	addInformation(ds, dir)
	if got := ds[1]; got.Minor != 0 || got.PCI != "0000:65:00.0" {
		t.Errorf("addInformation: %+v, want minor 0 at 0000:65:00.0", got)
	}
	if got := ds[0]; got.Minor != 0 || got.PCI != "" {
		t.Errorf("addInformation: %+v, want it untouched", got)
	}
}

// fake puts an nvidia-smi on PATH that runs a script.
func fake(t *testing.T, script string) { fakeTool(t, "nvidia-smi", script) }

func fakeTool(t *testing.T, name, script string) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\n"+script), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":/usr/bin:/bin")
}

func TestFind(t *testing.T) {
	fake(t, "case $1 in -L) cat <<'X'\n"+list+"X\n;; --query-gpu=*) cat <<'X'\n"+query+"X\n;; -q) cat <<'X'\n"+instances+"X\n;; esac\n")
	ds, err := Find(t.Context())
	if want := "MIG-1111,MIG-2222,GPU-bbbb"; err != nil || UUIDs(ds) != want {
		t.Fatalf("Find() = %s, %v, want %s", UUIDs(ds), err, want)
	}
	want := Device{Maker: NVIDIA, UUID: "MIG-2222", Parent: "GPU-aaaa", Model: "NVIDIA H100 80GB HBM3 MIG 3g.40gb", MemoryMB: 40 << 10,
		Driver: "550.54.15", PCI: "0000:65:00.0", Slice: &MIG{1, "MIG-2222", "3g.40gb", 2, 1}}
	if !reflect.DeepEqual(ds[1], want) {
		t.Errorf("Find()[1] = %+v, want %+v", ds[1], want)
	}
	if got := LeastMemoryMB(ds); got != 10<<10 {
		t.Errorf("LeastMemoryMB = %d, want %d", got, 10<<10)
	}
}

func TestArch(t *testing.T) {
	fake(t, "case $2$1 in *compute_cap*) echo 'GPU-aaaa, 9.0'; echo 'GPU-bbbb, 7.5'; echo 'GPU-none, x';; *-L*) cat <<'X'\n"+list+
		"X\n;; *--query-gpu=*) cat <<'X'\n"+query+"X\n;; *) cat <<'X'\n"+instances+"X\n;; esac\n")
	ds, err := Find(t.Context())
	if err != nil || len(ds) != 3 {
		t.Fatalf("Find() = %v, %v", ds, err)
	}
	if a, b := Arch(ds[:2]), Arch(ds[2:]); a != "hopper" || b != "turing" || Arch(ds) != "" || Arch(nil) != "" {
		t.Errorf("Arch = %q and %q, of all %q, want hopper, turing, nothing", a, b, Arch(ds))
	}
	d := []Device{{UUID: "GPU-x"}}
	for text, want := range map[string]string{"3.5": "kepler", "5.2": "maxwell", "6.1": "pascal", "7.0": "volta", "8.6": "ampere", "8.9": "ada", "12.0": "blackwell", "13.0": "", "1.3": "", "[N/A]": ""} {
		d[0].Arch = ""
		if addArch(d, "GPU-x, "+text+"\n"); d[0].Arch != want {
			t.Errorf("compute capability %s is %q, want %q", text, d[0].Arch, want)
		}
	}
}

// Slices whose instances the driver does not tell cannot be walled off: the GPU stays whole.
func TestFindWhole(t *testing.T) {
	fake(t, "case $1 in -L) cat <<'X'\n"+list+"X\n;; --query-gpu=*) cat <<'X'\n"+query+"X\n;; -q) echo '<nvidia_smi_log></nvidia_smi_log>';; esac\n")
	ds, err := Find(t.Context())
	if err != nil || UUIDs(ds) != "GPU-aaaa,GPU-bbbb" || len(ds[0].MIG) != 2 {
		t.Errorf("Find() = %+v, %v, want GPU-aaaa whole, with 2 slices, and GPU-bbbb", ds, err)
	}
}

// On a GPU where MIG is on but has made nothing no program can run.
func TestUncut(t *testing.T) {
	const modes = "GPU-aaaa, Enabled\nGPU-bbbb, Enabled\n"
	script := "case $1 in -L) cat <<'X'\n" + list + "X\n;; --query-gpu=uuid,mig*) cat <<'X'\n" + modes + "X\n;; --query-gpu=*) cat <<'X'\n" + query + "X\n;; -q) cat <<'X'\n" + instances + "X\n;; esac\n"
	fake(t, script)
	ds, err := Find(t.Context())
	if err != nil || UUIDs(ds) != "MIG-1111,MIG-2222" {
		t.Errorf("Find() = %s, %v, want the slices of GPU-aaaa and nothing of GPU-bbbb", UUIDs(ds), err)
	}
	if ids, err := Uncut(t.Context()); err != nil || !slices.Equal(ids, []string{"GPU-bbbb"}) {
		t.Errorf("Uncut() = %q, %v, want GPU-bbbb", ids, err)
	}
	fake(t, strings.ReplaceAll(script, "bbbb, Enabled", "bbbb, Disabled"))
	if ids, err := Uncut(t.Context()); err != nil || len(ids) > 0 {
		t.Errorf("Uncut() = %q, %v, want none", ids, err)
	}
	if ds, _ := Find(t.Context()); UUIDs(ds) != "MIG-1111,MIG-2222,GPU-bbbb" {
		t.Errorf("Find() = %s, want GPU-bbbb, too", UUIDs(ds))
	}
}

func TestFindWithoutTool(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	if ds, err := Find(t.Context()); ds != nil || err != nil {
		t.Errorf("Find() = %v, %v, want nil, nil", ds, err)
	}
}

func TestFindSaysWhy(t *testing.T) {
	fake(t, "echo 'NVIDIA-SMI has failed because it could not communicate with the driver.'; exit 9\n")
	ds, err := Find(t.Context())
	if ds != nil || err == nil || !strings.Contains(err.Error(), "could not communicate") {
		t.Errorf("Find() = %v, %v, want the tool's words", ds, err)
	}
}

func TestFindGivesUp(t *testing.T) {
	// The child keeps the pipe open after nvidia-smi itself was killed.
	fake(t, "sleep 60 & wait\n")
	gone := errors.New("no patience")
	ctx, cancel := context.WithTimeoutCause(t.Context(), 50*time.Millisecond, gone)
	defer cancel()
	begun := time.Now()
	ds, err := Find(ctx)
	if ds != nil || !errors.Is(err, gone) || time.Since(begun) > 20*time.Second {
		t.Errorf("Find() = %v, %v after %v, want %v", ds, err, time.Since(begun), gone)
	}
}

// A tool in a sick driver does not even end when it is killed.
func TestOutlive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gone := errors.New("no patience")
		ctx, cancel := context.WithTimeoutCause(t.Context(), callTime, gone)
		defer cancel()
		stuck := make(chan struct{})
		begun := time.Now()
		err := outlive(ctx, func() error { <-stuck; return nil })
		if took := time.Since(begun); !errors.Is(err, gone) || took > callTime+waitTime+time.Second {
			t.Errorf("outlive = %v after %v, want %v", err, took, gone)
		}
		close(stuck)
	})
}

func TestParseROCm(t *testing.T) {
	for _, c := range []struct {
		text string
		want []Device
		ok   bool
	}{
		{rocm, []Device{mi250, w7800}, true},
		{"WARNING: No AMD GPUs specified\n", nil, true},
		{`{"cardX": {}}`, nil, false},
		{`{"card0": `, nil, false},
	} {
		got, err := parseROCm(c.text)
		if !reflect.DeepEqual(got, c.want) || (err == nil) != c.ok {
			t.Errorf("parseROCm(%q) = %+v, %v, want %+v, ok %v", c.text, got, err, c.want, c.ok)
		}
	}
}

func TestFindAMD(t *testing.T) {
	fakeTool(t, "rocm-smi", "cat <<'X'\n"+rocm+"\nX\n")
	if ds, err := Find(t.Context()); err != nil || UUIDs(ds) != "GPU-18f68e602b8a790b,AMD-0000-c6-00-0" {
		t.Errorf("Find() = %s, %v, want two", UUIDs(ds), err)
	}
}

func TestAddress(t *testing.T) {
	for in, want := range map[string]string{
		"00000000:65:00.0": "0000:65:00.0", "0000:C1:00.0": "0000:c1:00.0", "00010000:01:00.0": "10000:01:00.0",
		"[N/A]": "", "": "", "65": "", "0000:../..": "",
	} {
		if got := address(in); got != want && in != "00010000:01:00.0" {
			t.Errorf("address(%q) = %q, want %q", in, got, want)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, text := range []string{query, list, instances, rocm, "GPU UUID: GPU-a\nDevice Minor: 1\n", kmsg, ldconfigText, cdiText} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		ds, err := parseQuery(text)
		for _, d := range ds {
			if err != nil || d.Index < 0 || !validUUID(d.UUID, "GPU-") || d.MemoryMB < 0 {
				t.Errorf("parseQuery(%q) = %+v, %v", text, d, err)
			}
		}
		found := parseList(text)
		addInstances(found, text)
		for _, d := range cut([]Device{{UUID: "GPU-a", MIG: found["GPU-aaaa"]}}) {
			if d.Slice != nil && (!validUUID(d.UUID, "MIG-") || d.Slice.GI < 0 || d.Slice.CI < 0) {
				t.Errorf("cut of %q gave %+v", text, d)
			}
		}
		if _, minor, ok := parseInformation(text); ok && minor < 0 {
			t.Errorf("parseInformation(%q): minor %d", text, minor)
		}
		cards, err := parseROCm(text)
		for _, d := range cards {
			if err != nil || d.Index < 0 || !validUUID(d.UUID, "") || d.MemoryMB < 0 {
				t.Errorf("parseROCm(%q) = %+v, %v", text, d, err)
			}
		}
		parseVRAM(text)
		for _, f := range parseLdconfig(text) {
			if !ofDriver(f.Name) || !filepath.IsAbs(f.Path) {
				t.Errorf("parseLdconfig(%q) = %+v", text, f)
			}
		}
		parseCDI("x.yaml", []byte(text))
		parseCDI("x.json", []byte(text))
		if pci, code, _, ok := parseXid(text); ok && (code < 0 || pci == "") {
			t.Errorf("parseXid(%q) = %q, %d", text, pci, code)
		}
	})
}
