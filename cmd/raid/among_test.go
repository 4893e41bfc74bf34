package main

import (
	"bytes"
	"strings"
	"testing"

	"github.com/charmbracelet/log"

	"github.com/rai-project/raid/sshd/store"
)

// TestCompare: of raids that run something else than this one the log warns, of others not.
func TestCompare(t *testing.T) {
	var out bytes.Buffer
	h := &house{log: log.New(&out)}
	h.compare("v1 (a)", []store.Member{{Addr: "raid-a:2222", Version: "v1 (a)"}})
	if out.Len() > 0 {
		t.Errorf("of a raid that runs the same: %s", &out)
	}
	h.compare("v1 (a)", []store.Member{{Addr: "raid-a:2222", Version: "v1 (a)"}, {Addr: "raid-b:2222", Version: "v2 (b)"}, {Addr: "raid-c:2222"}})
	lines := strings.Split(strings.TrimSpace(out.String()), "\n")
	for i, want := range []string{`raid=raid-b:2222 runs="v2 (b)" this="v1 (a)"`, `raid=raid-c:2222 runs=unknown`} {
		if len(lines) != 2 || !strings.HasPrefix(lines[i], "WARN") || !strings.Contains(lines[i], want) {
			t.Errorf("line %d of\n%s\nwant a warning with %s", i, &out, want)
		}
	}
}
