package gpu

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// findAMD asks rocm-smi.
func findAMD(ctx context.Context) ([]Device, error) {
	if !has("rocm-smi") {
		return nil, nil
	}
	out, err := call(ctx, "rocm-smi", "--showid", "--showuniqueid", "--showproductname", "--showmeminfo", "vram", "--showbus", "--showdriverversion", "--json")
	if err != nil {
		return nil, err
	}
	ds, err := parseROCm(out)
	for i := range ds {
		ds[i].Minor = renderMinor("/", ds[i].PCI)
	}
	return ds, err
}

// parseROCm reads the JSON of rocm-smi: "card0", "card1" …, "system". Its keys changed
// their case over time. Warnings may stand before the object.
func parseROCm(text string) (ds []Device, err error) {
	at := strings.IndexByte(text, '{')
	if at < 0 {
		return nil, nil // "WARNING: No AMD GPUs specified"
	}
	var cards map[string]map[string]string
	if err := json.Unmarshal([]byte(text[at:]), &cards); err != nil {
		return nil, fmt.Errorf("rocm-smi: %w", err)
	}
	driver := lookup(cards["system"], "driver version")
	for name, card := range cards {
		n, ok := strings.CutPrefix(name, "card")
		if !ok {
			continue
		}
		d := Device{Maker: AMD, Driver: driver, Minor: -1, PCI: address(lookup(card, "pci bus")),
			Model: cmp.Or(lookup(card, "card series"), lookup(card, "card model"), lookup(card, "device name"), "AMD GPU")}
		if d.Index = number(n); d.Index < 0 {
			return nil, fmt.Errorf("rocm-smi said %q", name)
		}
		total, _ := strconv.ParseInt(lookup(card, "vram total memory (b)"), 10, 64)
		d.MemoryMB = max(total, 0) >> 20
		d.UUID = "GPU-" + strings.TrimPrefix(strings.ToLower(lookup(card, "unique id")), "0x")
		if !validUUID(d.UUID, "GPU-") { // a card without a number of its own is known by its place
			d.UUID = "AMD-" + strings.NewReplacer(":", "-", ".", "-").Replace(cmp.Or(d.PCI, name))
		}
		ds = append(ds, d)
	}
	slices.SortFunc(ds, func(a, b Device) int { return a.Index - b.Index })
	return ds, nil
}

func lookup(card map[string]string, key string) string {
	for k, v := range card {
		if strings.EqualFold(k, key) {
			return strings.TrimSpace(v)
		}
	}
	return ""
}

// renderMinor finds the node that opens a card, -1 for none.
func renderMinor(root, pci string) int {
	found, _ := filepath.Glob(filepath.Join(root, "sys/bus/pci/devices", pci, "drm/renderD*"))
	if pci == "" || len(found) != 1 {
		return -1
	}
	return number(strings.TrimPrefix(filepath.Base(found[0]), "renderD"))
}

// parseVRAM reads how many MiB of each card are in use, by index.
func parseVRAM(text string) map[int]int64 {
	var cards map[string]map[string]string
	at := strings.IndexByte(text, '{')
	if at < 0 || json.Unmarshal([]byte(text[at:]), &cards) != nil {
		return nil
	}
	used := map[int]int64{}
	for name, card := range cards {
		n, ok := strings.CutPrefix(name, "card")
		b, err := strconv.ParseInt(lookup(card, "vram total used memory (b)"), 10, 64)
		if ok && err == nil {
			used[number(n)] = b >> 20
		}
	}
	return used
}
