// Package cli is what raid, rai, rai-keygen and rai-crypto share as programs: what
// an error means to the shell and to the reader, and which build this is.
//
// An error is one sentence, a hint what to do, and an exit status; it is printed in
// one place, by main, so that everything else returns errors.
package cli

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/rai-project/raid/keys"
	"github.com/rai-project/raid/keys/dial"
)

// Exit statuses of the clients.
const (
	Usage       = 64  // the command line is wrong
	Input       = 65  // a file, a name or a row is wrong
	Refused     = 126 // raid does not let this key do that
	Interrupted = 130 // 128 + SIGINT
	Connect     = 255 // no connection, or it was lost: as ssh's
)

// An Error ends the program with a status, a sentence and perhaps a hint.
type Error struct {
	Status int
	Err    error
	Hint   string
}

func (e *Error) Error() string { return e.Err.Error() }
func (e *Error) Unwrap() error { return e.Err }

// Fail is an error with a status and a hint, which may be "".
func Fail(status int, err error, hint string) error {
	return &Error{Status: status, Err: err, Hint: hint}
}

// Usagef is an error about the command line.
func Usagef(hint, format string, args ...any) error {
	return Fail(Usage, fmt.Errorf(format, args...), hint)
}

// Hintf adds a hint to an error of a program that serves: it ends with status 1.
func Hintf(err error, format string, args ...any) error {
	return Fail(1, err, fmt.Sprintf(format, args...))
}

// Verdict says what an error means: the exit status, and what to do about it. Errors
// it does not know are of the given status.
func Verdict(err error, otherwise int) (status int, hint string) {
	var e *Error
	var host *dial.HostKeyError
	var login *dial.LoginError
	var refused *keys.RefusedError
	switch {
	case errors.As(err, &e):
		return e.Status, e.Hint
	case errors.As(err, &host):
		return Connect, host.Hint()
	case errors.As(err, &login):
		return Connect, "name the key with -i FILE; the staff enrol keys"
	case errors.As(err, &refused):
		return Input, refused.Hint
	case errors.Is(err, dial.ErrConnect):
		return Connect, "is raid running, and is the server's name right?"
	case errors.Is(err, dial.ErrLost):
		return Connect, "whatever raid had accepted stays so"
	}
	return otherwise, ""
}

// Exit prints an error of the named program, if there is one, and ends the process.
func Exit(name string, err error, otherwise int) {
	if err == nil {
		os.Exit(0)
	}
	os.Exit(Report(os.Stderr, name, err, otherwise))
}

// Report prints an error of the named program and returns its exit status.
func Report(w io.Writer, name string, err error, otherwise int) int {
	status, hint := Verdict(err, otherwise)
	fmt.Fprintf(w, "%s: %v\n", name, err)
	if hint != "" {
		fmt.Fprintf(w, "%s: %s\n", name, hint)
	}
	return status
}

// Locked returns a writer for several goroutines: raid's stderr arrives in one, our
// own lines come from others.
func Locked(w io.Writer) io.Writer { return &locked{w: w} }

type locked struct {
	mu sync.Mutex
	w  io.Writer
}

func (l *locked) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.w.Write(p)
}

// PlainUsage makes the help of a command, and of those below it, say "--flag" where
// pflag would say "--flag[=true|false]".
func PlainUsage(root *cobra.Command) *cobra.Command {
	usage := root.UsageFunc()
	root.SetUsageFunc(func(cmd *cobra.Command) error {
		var text bytes.Buffer
		out := cmd.OutOrStderr()
		cmd.SetOut(&text)
		err := usage(cmd)
		cmd.SetOut(out)
		io.WriteString(out, strings.ReplaceAll(text.String(), "[=true|false]", "             ")) // as wide
		return err
	})
	return root
}

// AskPassphrase asks the person at the terminal for a key's passphrase.
func AskPassphrase(path string) ([]byte, error) {
	fd := int(os.Stdin.Fd())
	if !term.IsTerminal(fd) {
		return nil, errors.New("there is no terminal to ask at; load the key into ssh-agent")
	}
	fmt.Fprintf(os.Stderr, "Passphrase of %s: ", path)
	defer fmt.Fprintln(os.Stderr)
	return term.ReadPassword(fd)
}

// A Build says which build a program is.
type Build struct{ Version, Commit, Time, Go string }

// Built reads what the tool chain left in the binary; stamp is the linker's -X, "" for
// none.
func Built(stamp string) Build {
	b := Build{Version: "devel", Time: stamp, Go: runtime.Version()}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return b
	}
	if v := info.Main.Version; v != "" && v != "(devel)" {
		b.Version = v
	}
	for _, s := range info.Settings {
		switch {
		case s.Key == "vcs.revision":
			b.Commit = s.Value[:min(12, len(s.Value))]
		case s.Key == "vcs.time" && b.Time == "":
			b.Time = s.Value
		}
	}
	if b.Time == "" {
		b.Time = "unknown"
	}
	return b
}

func (b Build) String() string {
	if b.Commit != "" {
		return b.Version + " (" + b.Commit + ") " + b.Go
	}
	return b.Version + " " + b.Go
}
