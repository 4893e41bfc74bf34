package gpu

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"
)

const (
	query = "1, GPU-bbbb, NVIDIA A40, 46068, 550.54.15\n0, GPU-aaaa, NVIDIA H100 80GB HBM3, 81559, 550.54.15\n"
	list  = `GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-aaaa)
  MIG 1g.10gb     Device  0: (UUID: MIG-1111)
  MIG 3g.40gb     Device  1: (UUID: MIG-2222)
GPU 1: NVIDIA A40 (UUID: GPU-bbbb)
`
)

func TestParseQuery(t *testing.T) {
	two := []Device{
		{Index: 0, UUID: "GPU-aaaa", Model: "NVIDIA H100 80GB HBM3", MemoryMB: 81559, Driver: "550.54.15"},
		{Index: 1, Minor: 1, UUID: "GPU-bbbb", Model: "NVIDIA A40", MemoryMB: 46068, Driver: "550.54.15"},
	}
	for _, c := range []struct {
		text string
		want []Device
		ok   bool
	}{
		{query, two, true},
		{"", nil, true},
		{"No devices were found\n", nil, true},
		{"0, GPU-a, Odd, name, [N/A], 1.2\n", []Device{{UUID: "GPU-a", Model: "Odd, name", Driver: "1.2"}}, true},
		{"x, GPU-a, Name, 1, 1.2\n", nil, false},
		{"-1, GPU-a, Name, 1, 1.2\n", nil, false},
		{"0, ../../etc, Name, 1, 1.2\n", nil, false},
		{"Unable to determine the device handle for GPU0: Unknown Error\n", nil, false},
	} {
		got, err := parseQuery(c.text)
		if !reflect.DeepEqual(got, c.want) || (err == nil) != c.ok {
			t.Errorf("parseQuery(%q) = %v, %v, want %v, ok %v", c.text, got, err, c.want, c.ok)
		}
	}
}

func TestParseList(t *testing.T) {
	want := map[string][]MIG{"GPU-aaaa": {{0, "MIG-1111", "1g.10gb"}, {1, "MIG-2222", "3g.40gb"}}}
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
func fake(t *testing.T, script string) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "nvidia-smi"), []byte("#!/bin/sh\n"+script), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":/usr/bin:/bin")
}

func TestFind(t *testing.T) {
	fake(t, "case $1 in -L) cat <<'X'\n"+list+"X\n;; --query-gpu=*) cat <<'X'\n"+query+"X\n;; esac\n")
	ds, err := Find(t.Context())
	if err != nil || len(ds) != 2 || ds[0].UUID != "GPU-aaaa" || len(ds[0].MIG) != 2 || len(ds[1].MIG) != 0 {
		t.Errorf("Find() = %+v, %v, want GPU-aaaa with 2 slices and GPU-bbbb", ds, err)
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

func FuzzParse(f *testing.F) {
	f.Add(query)
	f.Add(list)
	f.Add("GPU UUID: GPU-a\nDevice Minor: 1\n")
	f.Fuzz(func(t *testing.T, text string) {
		ds, err := parseQuery(text)
		for _, d := range ds {
			if err != nil || d.Index < 0 || !strings.HasPrefix(d.UUID, "GPU-") {
				t.Errorf("parseQuery(%q) = %+v, %v", text, d, err)
			}
		}
		addMIG(ds, parseList(text))
		if _, minor, ok := parseInformation(text); ok && minor < 0 {
			t.Errorf("parseInformation(%q): minor %d", text, minor)
		}
	})
}
