package door

import (
	"strings"

	"golang.org/x/crypto/ssh"
)

// What a client may send before its command, read with care: gliderlabs' own readers
// crash on it (defect b).

const (
	maxCommand = 16 << 10 // bytes of an exec request
	maxEnv     = 8 << 10  // bytes of all environment requests of a session, and
	maxEnvVars = 64       // how many
	maxSide    = 1 << 12  // columns or rows of a terminal; a full-screen view allocates them
	maxTerm    = 64       // bytes of a terminal's name
)

// parseExec reads the payload of an exec request: RFC 4254 §6.5.
func parseExec(payload []byte) (command string, ok bool) {
	var msg struct{ Command string }
	if len(payload) > maxCommand || ssh.Unmarshal(payload, &msg) != nil {
		return "", false
	}
	return msg.Command, true
}

// parseEnv reads the payload of an env request: RFC 4254 §6.4.
func parseEnv(payload []byte) (name, value string, ok bool) {
	var msg struct{ Name, Value string }
	if len(payload) > maxEnv || ssh.Unmarshal(payload, &msg) != nil {
		return "", "", false
	}
	if !allowedEnv(msg.Name) || strings.ContainsRune(msg.Value, 0) {
		return "", "", false
	}
	return msg.Name, msg.Value, true
}

// allowedEnv lists the variables a client may set. Never LD_*, PATH and the like, even
// though nothing here passes them to a process.
func allowedEnv(name string) bool {
	for i := range len(name) {
		if c := name[i]; c != '_' && !isDigit(c) && !isLetter(c) {
			return false
		}
	}
	switch name {
	case "GIT_PROTOCOL", "LANG", "TERM":
		return true
	}
	return strings.HasPrefix(name, "LC_") || strings.HasPrefix(name, "RAI_")
}

// parsePTY reads the payload of a pty-req: RFC 4254 §6.2. The modes are of no use here.
func parsePTY(payload []byte) (term string, size uint64, ok bool) {
	var msg struct {
		Term                         string
		Columns, Rows, Width, Height uint32
		Modes                        string
	}
	if ssh.Unmarshal(payload, &msg) != nil {
		return "", 0, false
	}
	return cleanTerm(msg.Term), packSize(msg.Columns, msg.Rows), true
}

// parseResize reads the payload of a window-change: RFC 4254 §6.7.
func parseResize(payload []byte) (size uint64, ok bool) {
	var msg struct{ Columns, Rows, Width, Height uint32 }
	if ssh.Unmarshal(payload, &msg) != nil {
		return 0, false
	}
	return packSize(msg.Columns, msg.Rows), true
}

// parseSignal reads the payload of a signal request: RFC 4254 §6.9. Only those that
// mean "stop" are of interest.
func parseSignal(payload []byte) (name string, ok bool) {
	var msg struct{ Name string }
	if ssh.Unmarshal(payload, &msg) != nil {
		return "", false
	}
	switch msg.Name {
	case "INT", "TERM", "HUP":
		return msg.Name, true
	}
	return "", false
}

// cleanTerm is a terminal's name if it looks like one; it may end up in an environment
// or a log.
func cleanTerm(term string) string {
	if term == "" || len(term) > maxTerm {
		return "dumb"
	}
	for i := range len(term) {
		if c := term[i]; !isDigit(c) && !isLetter(c) && !strings.ContainsRune("-+._", rune(c)) {
			return "dumb"
		}
	}
	return term
}

// packSize keeps a size in one word, so that it can be read while it changes.
func packSize(columns, rows uint32) uint64 {
	return uint64(min(columns, maxSide))<<32 | uint64(min(rows, maxSide))
}

func isDigit(c byte) bool  { return '0' <= c && c <= '9' }
func isLetter(c byte) bool { return 'a' <= c|0x20 && c|0x20 <= 'z' }
