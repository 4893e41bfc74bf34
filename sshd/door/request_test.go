package door

import (
	"bytes"
	"slices"
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"
)

func TestAllowedEnv(t *testing.T) {
	for name, want := range map[string]bool{
		"GIT_PROTOCOL": true, "LANG": true, "TERM": true, "LC_ALL": true, "RAI_QUEUE": true,
		"": false, "LD_PRELOAD": false, "PATH": false, "lang": false, "LC_A-B": false, "RAI_\n": false, "RAI_é": false,
	} {
		if got := allowedEnv(name); got != want {
			t.Errorf("allowedEnv(%q) = %v, want %v", name, got, want)
		}
	}
}

func TestCleanTerm(t *testing.T) {
	for term, want := range map[string]string{
		"xterm-256color": "xterm-256color", "screen.xterm+x_1": "screen.xterm+x_1",
		"": "dumb", "a\x1b[2J": "dumb", "../../x": "dumb", strings.Repeat("x", 65): "dumb",
	} {
		if got := cleanTerm(term); got != want {
			t.Errorf("cleanTerm(%q) = %q, want %q", term, got, want)
		}
	}
}

func TestSourceOf(t *testing.T) {
	for addr, want := range map[string]string{
		"192.0.2.7:22":            "192.0.2.7/32",
		"[::ffff:192.0.2.7]:22":   "192.0.2.7/32",
		"[2001:db8:1:2:3::4]:22":  "2001:db8:1:2::/64",
		"[fe80::1%eth0]:22":       "fe80::/64",
		"pipe":                    "invalid Prefix",
		"no-port.example.invalid": "invalid Prefix",
	} {
		if got := sourceOf(origin(&line{from: place(addr)})).String(); got != want {
			t.Errorf("sourceOf(%q) = %v, want %v", addr, got, want)
		}
	}
}

func TestQuoted(t *testing.T) {
	for s, want := range map[string]string{
		"rai": `"rai"`, "a\nb\x1b\"é": `"a\nb\x1b\"\u00e9"`, strings.Repeat("x", 100): `"` + strings.Repeat("x", 64) + `"`,
	} {
		if got := quoted(s); got != want {
			t.Errorf("quoted(%q) = %s, want %s", s, got, want)
		}
	}
}

func TestTranslate(t *testing.T) {
	for _, tt := range []struct {
		writes []string
		want   string
	}{
		{[]string{"a\nb"}, "a\r\nb"},
		{[]string{"a\r\nb"}, "a\r\nb"},
		{[]string{"a\r", "\nb"}, "a\r\nb"},
		{[]string{"\n\n"}, "\r\n\r\n"},
		{[]string{"\r\r\n"}, "\r\r\n"},
		{[]string{strings.Repeat("\n", 3*livePacket)}, strings.Repeat("\r\n", 3*livePacket)},
	} {
		var out bytes.Buffer
		s := stream{tty: true}
		s.open(&out)
		for _, w := range tt.writes {
			if n, err := s.Write([]byte(w)); n != len(w) || err != nil {
				t.Errorf("Write(%.20q) = %d, %v; want %d", w, n, err, len(w))
			}
		}
		if out.String() != tt.want {
			t.Errorf("%.20q becomes %.20q, want %.20q", tt.writes, out.String(), tt.want)
		}
	}
}

// packets keeps the sizes of writes.
type packets []int

func (p *packets) Write(b []byte) (int, error) { *p = append(*p, len(b)); return len(b), nil }

// Live output goes in small packets, bulk in big ones.
func TestPacketSizes(t *testing.T) {
	for size, want := range map[int]packets{
		1:                {1},
		livePacket:       {livePacket},
		10000:            {livePacket, livePacket, 10000 - 2*livePacket},
		bulkPacket:       {bulkPacket},
		2*bulkPacket + 1: {bulkPacket, bulkPacket, 1},
	} {
		var got packets
		var s stream
		s.open(&got)
		s.Write(make([]byte, size))
		if !slices.Equal(got, want) {
			t.Errorf("Write of %d bytes sends %v, want %v", size, got, want)
		}
	}
}

// Whatever a client sends in a request, what is kept of it is harmless.
func FuzzRequests(f *testing.F) {
	f.Add(ssh.Marshal(struct{ A string }{"submit"}))
	f.Add(ssh.Marshal(struct{ A, B string }{"LC_ALL", "C"}))
	f.Add(ssh.Marshal(struct {
		T          string
		W, H, X, Y uint32
		M          string
	}{"xterm", 80, 24, 0, 0, "\x00"}))
	f.Add(bytes.Repeat([]byte{0xff}, 16))
	f.Fuzz(func(t *testing.T, payload []byte) {
		if command, ok := parseExec(payload); ok && len(command) > maxCommand {
			t.Errorf("parseExec(%q): %d bytes", payload, len(command))
		}
		if name, value, ok := parseEnv(payload); ok && (!allowedEnv(name) || strings.ContainsRune(value, 0)) {
			t.Errorf("parseEnv(%q) = %q, %q", payload, name, value)
		}
		if term, size, ok := parsePTY(payload); ok && (term != cleanTerm(term) || size>>32 > maxSide || uint32(size) > maxSide) {
			t.Errorf("parsePTY(%q) = %q, %x", payload, term, size)
		}
		if size, ok := parseResize(payload); ok && (size>>32 > maxSide || uint32(size) > maxSide) {
			t.Errorf("parseResize(%q) = %x", payload, size)
		}
		if name, ok := parseSignal(payload); ok && !slices.Contains([]string{"INT", "TERM", "HUP"}, name) {
			t.Errorf("parseSignal(%q) = %q", payload, name)
		}
	})
}
