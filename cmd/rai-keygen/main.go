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
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/rai-project/raid/cmd/internal/cli"
	"github.com/rai-project/raid/keys"
	"github.com/rai-project/raid/keys/dial"
)

// buildTime is set by the linker: -X main.buildTime=2026-11-23T10:00:00Z.
var buildTime string

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	status := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(status)
}

// run is the program. It prints the error itself.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	stderr = cli.Locked(stderr)
	root := cli.PlainUsage(command(stdout, stderr))
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	return cli.Report(stderr, "rai-keygen", err, cli.Input)
}

// options are the flags.
type options struct {
	person                keys.Enrollment
	role                  string
	list, pub             string
	server, public        string // to talk to, and as profiles have it
	identity, known, out  string
	secret                string
	color, verbose, debug bool
	stdout, stderr        io.Writer
}

func command(stdout, stderr io.Writer) *cobra.Command {
	o := &options{stdout: stdout, stderr: stderr}
	root := &cobra.Command{
		Use:   "rai-keygen",
		Short: "Makes keys and enrols their owners with raid",
		Example: `  rai-keygen --server rai@127.0.0.1:2222 -i DIR/admin -u ada -e ada@example.edu -r student -t team7 --out KEYS
  rai-keygen --server rai@127.0.0.1:2222 --public rai@gpu.example.edu:2222 -i DIR/admin -l class.csv --out KEYS`,
		Args:          noArgs,
		SilenceErrors: true,
		SilenceUsage:  true,
		RunE:          func(cmd *cobra.Command, _ []string) error { return o.enroll(cmd.Context()) },
	}
	root.SetOut(stdout)
	root.SetErr(stderr)
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error {
		return cli.Usagef("rai-keygen --help lists the flags", "%w", err)
	})
	f := root.Flags()
	f.StringVarP(&o.person.User, "username", "u", "", "name of the user")
	f.StringVarP(&o.person.Email, "email", "e", "", "e-mail address")
	f.StringVarP(&o.role, "role", "r", "", "role: student, power, staff or admin")
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
	f.StringVar(&o.public, "public", "", "raid's address in the profiles, as rai@host:port (default: --server's)")
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
			Run: func(*cobra.Command, []string) { fmt.Fprintln(stdout, "rai-keygen", cli.Built(buildTime)) },
		},
		&cobra.Command{
			Use: "buildtime", Short: "Prints when this program was built", Args: noArgs,
			Run: func(*cobra.Command, []string) { fmt.Fprintln(stdout, "BuildDate:", cli.Built(buildTime).Time) },
		})
	return root
}

func noArgs(_ *cobra.Command, args []string) error {
	if len(args) > 0 {
		return cli.Usagef("rai-keygen --help", "unexpected %q", args[0])
	}
	return nil
}

func oneArg(_ *cobra.Command, args []string) error {
	if len(args) != 1 {
		return cli.Usagef("rai-keygen runner gpu1", "runner needs one name")
	}
	return nil
}

// connect logs in to raid.
func (o *options) connect(ctx context.Context) (*dial.Client, dial.Target, error) {
	if o.secret != "" {
		fmt.Fprintln(o.stderr, "rai-keygen: --secret has no meaning any more; people are known by their SSH keys")
	}
	if o.server == "" {
		return nil, dial.Target{}, cli.Usagef("--server rai@host:2222", "no server named")
	}
	if o.public != "" {
		if _, err := dial.Parse(o.public); err != nil {
			return nil, dial.Target{}, cli.Usagef("--public rai@host:2222", "--public: %w", err)
		}
	}
	t, err := dial.Parse(o.server)
	if err != nil {
		return nil, t, cli.Usagef("", "%w", err)
	}
	if err := t.Trust(o.known, o.identity); err != nil {
		return nil, t, err
	}
	if err := t.Identify(o.identity, cli.AskPassphrase); err != nil {
		return nil, t, err
	}
	c, err := dial.Dial(ctx, t)
	if err == nil && (o.verbose || o.debug) {
		fmt.Fprintf(o.stderr, "rai-keygen: connected to %s (%s)\n", t.Addr, c.ServerVersion())
	}
	return c, t, err
}
