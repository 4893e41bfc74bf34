// Rai-keygen makes keys and enrols their owners with raid.
//
// It makes an ed25519 key for a person, tells raid whose it is, and writes the profile
// that rai reads:
//
//	rai-keygen --server rai@gpu:2222 -i DIR/admin -u ada -e ada@example.edu -r student --out KEYS
//	rai-keygen --server rai@gpu:2222 -i DIR/admin -l class.csv --out KEYS
//	rai-keygen --server rai@gpu:2222 -i DIR/admin runner gpu1 --out KEYS
//
// A private key is written to a file of mode 0600 and nowhere else. A key file that
// exists is kept, so running the same line again changes nothing but what raid knows
// of the person.
//
// Exit status: 0; 64 the command line is wrong; 65 a row, a name or a key was refused;
// 255 no connection; what raid says otherwise (126: this key may not enrol).
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"
	"sync"
	"syscall"

	"github.com/rai-project/raid/keys"
	"github.com/rai-project/raid/keys/dial"
	"github.com/spf13/cobra"
	"golang.org/x/term"
)

// buildTime is set by the linker: -X main.buildTime=2026-11-23T10:00:00Z.
var buildTime string

// Exit statuses of our own.
const (
	exitUsage   = 64
	exitInput   = 65
	exitRefused = 126
	exitConnect = 255 // as ssh's
)

// An exitError ends the program with a status, a sentence and perhaps a hint.
type exitError struct {
	status int
	err    error
	hint   string
}

func (e *exitError) Error() string { return e.err.Error() }
func (e *exitError) Unwrap() error { return e.err }

func usage(hint, format string, args ...any) error {
	return &exitError{exitUsage, fmt.Errorf(format, args...), hint}
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	status := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(status)
}

// run is the program. It prints the error itself.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	stderr = &locked{w: stderr}
	root := command(stdout, stderr)
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	status, hint := verdict(err)
	fmt.Fprintf(stderr, "rai-keygen: %v\n", err)
	if hint != "" {
		fmt.Fprintf(stderr, "rai-keygen: %s\n", hint)
	}
	return status
}

// A locked writer takes whole writes from several goroutines: raid's stderr arrives in
// one, our own lines come from others.
type locked struct {
	mu sync.Mutex
	w  io.Writer
}

func (l *locked) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.w.Write(p)
}

// verdict says what an error means to the shell and to the reader.
func verdict(err error) (status int, hint string) {
	var exit *exitError
	var host *dial.HostKeyError
	var login *dial.LoginError
	var refused *keys.RefusedError
	switch {
	case errors.As(err, &exit):
		return exit.status, exit.hint
	case errors.As(err, &host):
		return exitConnect, host.Hint() + " (or name a file of such lines: --known-hosts FILE)"
	case errors.As(err, &login):
		return exitConnect, "name the key of an admin: -i DIR/admin"
	case errors.As(err, &refused):
		return exitInput, refused.Hint
	case errors.Is(err, dial.ErrConnect):
		return exitConnect, "is raid running, and is --server right?"
	case errors.Is(err, dial.ErrLost):
		return exitConnect, "run the same line again; what was enrolled stays so"
	}
	return exitInput, ""
}

// options are the flags.
type options struct {
	person                       keys.Enrollment
	role                         string
	list, pub                    string
	server, identity, known, out string
	secret                       string
	color, verbose, debug        bool
	stdout, stderr               io.Writer
}

func command(stdout, stderr io.Writer) *cobra.Command {
	o := &options{stdout: stdout, stderr: stderr}
	root := &cobra.Command{
		Use:   "rai-keygen",
		Short: "Makes keys and enrols their owners with raid",
		Example: `  rai-keygen --server rai@127.0.0.1:2222 -i DIR/admin -u ada -e ada@example.edu -r student -t team7 --out KEYS
  rai-keygen --server rai@127.0.0.1:2222 -i DIR/admin -l class.csv --out KEYS`,
		Args:          noArgs,
		SilenceErrors: true,
		SilenceUsage:  true,
		RunE:          func(cmd *cobra.Command, _ []string) error { return o.enroll(cmd.Context()) },
	}
	root.SetOut(stdout)
	root.SetErr(stderr)
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usage("rai-keygen --help lists the flags", "%w", err) })
	f := root.Flags()
	f.StringVarP(&o.person.User, "username", "u", "", "name of the user")
	f.StringVarP(&o.person.Email, "email", "e", "", "e-mail address")
	f.StringVarP(&o.role, "role", "r", "", "role: student, power, staff, admin or one of raid.toml's")
	f.StringVarP(&o.person.First, "firstname", "f", "", "first name")
	f.StringVar(&o.person.Last, "lastname", "", "last name")
	f.StringVar(&o.person.Affiliation, "affiliation", "", "affiliation")
	f.StringVarP(&o.person.Team, "teamname", "t", "", "team; - for none")
	f.StringVar(&o.person.Team, "team", "", "the same as --teamname")
	f.Lookup("team").Hidden = true
	f.StringVarP(&o.list, "list", "l", "", "enrol a class: CSV of lastname, firstname, username, email, role, affiliation")
	f.StringVar(&o.pub, "pub", "", "enrol this public key instead of making one")
	p := root.PersistentFlags()
	p.StringVarP(&o.server, "server", "S", os.Getenv("RAI_SERVER"), "raid, as rai@host:port (default: RAI_SERVER)")
	p.StringVarP(&o.identity, "identity", "i", "", "private key to log in with (default: ssh-agent, ~/.ssh)")
	p.StringVar(&o.known, "known-hosts", "", "file with raid's host key (default: host_key.pub beside -i, ~/.ssh/known_hosts)")
	p.StringVar(&o.out, "out", ".", "folder for the keys and profiles")
	p.StringVarP(&o.secret, "secret", "s", "", "RAI's app secret; has no meaning any more")
	p.BoolVarP(&o.color, "color", "c", true, "accepted as in RAI; there is no colour to switch off")
	p.BoolVarP(&o.verbose, "verbose", "v", false, "say more")
	p.BoolVarP(&o.debug, "debug", "d", false, "say still more")
	root.AddCommand(
		&cobra.Command{
			Use: "runner NAME", Short: "Makes a key for a runner and enrols it", Args: oneArg,
			RunE: func(cmd *cobra.Command, args []string) error { return o.enrollRunner(cmd.Context(), args[0]) },
		},
		&cobra.Command{
			Use: "version", Short: "Prints the version", Args: noArgs,
			Run: func(*cobra.Command, []string) { fmt.Fprintln(stdout, "rai-keygen", version()) },
		},
		&cobra.Command{
			Use: "buildtime", Short: "Prints when this program was built", Args: noArgs,
			Run: func(*cobra.Command, []string) { fmt.Fprintln(stdout, "BuildDate:", buildTime) },
		})
	return root
}

func noArgs(_ *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usage("rai-keygen --help", "unexpected %q", args[0])
	}
	return nil
}

func oneArg(_ *cobra.Command, args []string) error {
	if len(args) != 1 {
		return usage("rai-keygen runner gpu1", "runner needs one name")
	}
	return nil
}

// version is what the Go tool wrote into the binary.
func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	v := info.Main.Version
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" && !strings.Contains(v, s.Value[:min(12, len(s.Value))]) {
			v += " " + s.Value[:min(12, len(s.Value))]
		}
	}
	return v + " " + info.GoVersion
}

// connect logs in to raid.
func (o *options) connect(ctx context.Context) (*dial.Client, dial.Target, error) {
	if o.secret != "" {
		fmt.Fprintln(o.stderr, "rai-keygen: --secret has no meaning any more; people are known by their SSH keys")
	}
	if o.server == "" {
		return nil, dial.Target{}, usage("--server rai@host:2222", "no server named")
	}
	t, err := dial.Parse(o.server)
	if err != nil {
		return nil, t, usage("", "%w", err)
	}
	if err := t.Trust(o.known, o.identity); err != nil {
		return nil, t, err
	}
	if err := t.Identify(o.identity, askPassphrase); err != nil {
		return nil, t, err
	}
	c, err := dial.Dial(ctx, t)
	if err == nil && (o.verbose || o.debug) {
		fmt.Fprintf(o.stderr, "rai-keygen: connected to %s (%s)\n", t.Addr, c.ServerVersion())
	}
	return c, t, err
}

// askPassphrase asks the person at the terminal.
func askPassphrase(path string) ([]byte, error) {
	fd := int(os.Stdin.Fd())
	if !term.IsTerminal(fd) {
		return nil, errors.New("there is no terminal to ask at; load the key into ssh-agent")
	}
	fmt.Fprintf(os.Stderr, "Passphrase of %s: ", path)
	defer fmt.Fprintln(os.Stderr)
	return term.ReadPassword(fd)
}
