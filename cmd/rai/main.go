// Rai packs a folder, has raid run it and shows what comes of it.
//
//	rai -p DIR                    # submit DIR, watch it run, exit with its status
//	rai -p DIR --submit final -o build
//	rai -- nvidia-smi             # run this instead of the build file's commands
//	rai status 17 --json          # every other word is raid's own command
//
// All it does plain ssh can do as well: it only saves typing, leaves out what
// .gitignore and .raiignore name, and compresses while it sends. Where raid is and
// which key to use stands in ~/.rai_profile (package keys/profile).
//
// Ctrl-C while a job that rai submitted is running cancels the job; a second one
// leaves without waiting for anything.
//
// Exit status: the job's own, or what raid says (124 time limit, 125 raid's fault, 126
// refused, 65 bad input, 75 try later). rai's own are 64 (command line), 65 (profile,
// folder, output), 130 (Ctrl-C) and, as ssh's, 255 (no connection, or it was lost).
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/rai-project/raid/cmd/internal/cli"
	"github.com/rai-project/raid/keys/dial"
	"github.com/rai-project/raid/keys/profile"
)

// buildTime is set by the linker: -X main.buildTime=2026-11-23T10:00:00Z.
var buildTime string

// errInterrupted is the cause of a context that a signal ended.
var errInterrupted = errors.New("interrupted")

// errStatus ends the program with a job's or raid's status; all is said.
type errStatus int

func (e errStatus) Error() string { return fmt.Sprintf("exit status %d", int(e)) }

func main() {
	ctx, stop := interruptible()
	a := &app{in: os.Stdin, out: os.Stdout, err: cli.Locked(os.Stderr), tty: isTerminal(os.Stderr)}
	status := a.run(ctx, os.Args[1:])
	stop()
	os.Exit(status)
}

// interruptible returns a context that the first signal ends. The second ends the
// program at once. A broken pipe is an error of the write, not the end of us: raid
// must be told that we leave.
func interruptible() (context.Context, func()) {
	ctx, cancel := context.WithCancelCause(context.Background())
	signal.Ignore(syscall.SIGPIPE)
	ch := make(chan os.Signal, 2)
	signal.Notify(ch, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	done := make(chan struct{})
	go func() {
		for range ch {
			if ctx.Err() != nil {
				os.Exit(cli.Interrupted)
			}
			cancel(errInterrupted)
		}
		close(done)
	}()
	return ctx, func() {
		signal.Stop(ch)
		close(ch)
		<-done
		cancel(nil)
	}
}

// An app is one run of the program.
type app struct {
	in       *os.File
	out, err io.Writer // err takes writes of several goroutines
	tty      bool      // err is a terminal
	tail     []string  // the words after "--"
	dashed   bool      // there was a "--"

	profile, server, identity, known string
	secret                           string
	color, verbose, debug            bool
	submission

	accounts *profile.Profile // whose accounts raid may see, set by connect
}

// run is the program. It prints the error itself.
func (a *app) run(ctx context.Context, args []string) int {
	// Split here, for cobra would take "rai -- logs" for the command logs.
	if i := slices.Index(args, "--"); i >= 0 {
		args, a.tail, a.dashed = args[:i], args[i+1:], true
	}
	root := cli.PlainUsage(a.command())
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	var status errStatus
	if errors.As(err, &status) {
		return int(status)
	}
	code, hint := verdict(err)
	a.say("%v", err)
	if hint != "" {
		a.say("%s", hint)
	}
	return code
}

// verdict is cli.Verdict with what only rai knows.
func verdict(err error) (status int, hint string) {
	var login *dial.LoginError
	switch {
	case errors.Is(err, errInterrupted):
		return cli.Interrupted, ""
	case errors.As(err, &login):
		return cli.Connect, "name your key: -i FILE, or key: in ~/.rai_profile; the staff enrol keys"
	case errors.Is(err, dial.ErrConnect):
		return cli.Connect, "is the server right (--server, or server: in the profile), and are you on the campus network?"
	}
	return cli.Verdict(err, cli.Input)
}

// say prints one line of our own.
func (a *app) say(format string, args ...any) {
	prefix := "rai: "
	if a.color && a.tty {
		prefix = "\x1b[33mrai:\x1b[0m "
	}
	fmt.Fprintf(a.err, prefix+format+"\n", args...)
}

func isTerminal(w any) bool {
	f, ok := w.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

// passed are the words that are raid's own commands: they are sent as they are typed.
// A test against raid's table keeps the list whole.
var passed = [...]struct{ use, short string }{
	{"status [JOB]", "what became of a job, or of your last ones"},
	{"queue", "who waits"},
	{"logs JOB [-f] [-n N]", "a job's output so far"},
	{"attach JOB", "follow a job; exits with its status"},
	{"history [-n N]", "your jobs"},
	{"cancel JOB...", "end jobs"},
	{"rerun JOB", "submit the same again"},
	{"output JOB [PATH]", "the /build folder as a tar, on stdout"},
	{"source JOB", "what was submitted, as a tar on stdout"},
	{"why JOB", "what a job waits for"},
	{"runners", "the machines"},
	{"whoami", "who raid thinks you are"},
	{"admin ...", "for staff"},
}

func (a *app) command() *cobra.Command {
	root := &cobra.Command{
		Use:   "rai [flags] [-- CMD...]",
		Short: "Submits a folder to raid and shows what comes of it",
		Example: `  rai -p DIR                      submit DIR and watch
  rai -p DIR --submit final       a submission that counts
  rai -- nvidia-smi               run a command of your own
  rai logs 17 -f                  any command of raid's`,
		SilenceErrors:    true,
		SilenceUsage:     true,
		TraverseChildren: true, // our flags come before the command, raid's after it
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 0 {
				return cli.Usagef("rai --help lists the commands; to submit a folder: rai -p DIR; to run a command: rai -- CMD", "unknown command %q", args[0])
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.submit(cmd.Context(), cmd.Flags().Changed("path"))
		},
	}
	root.SetOut(a.out)
	root.SetErr(a.err)
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return cli.Usagef("rai --help lists the flags", "%w", err) })
	a.flags(root)
	for _, p := range passed {
		name, _, _ := strings.Cut(p.use, " ")
		root.AddCommand(&cobra.Command{
			Use: p.use, Short: p.short, DisableFlagParsing: true,
			RunE: func(cmd *cobra.Command, args []string) error { return a.pass(cmd.Context(), name, args) },
		})
	}
	root.AddCommand(
		&cobra.Command{Use: "version", Short: "prints the version", Args: cobra.NoArgs,
			Run: func(*cobra.Command, []string) { fmt.Fprintln(a.out, "rai", cli.Built(buildTime)) }},
		&cobra.Command{Use: "buildtime", Short: "prints when this program was built", Args: cobra.NoArgs,
			Run: func(*cobra.Command, []string) { fmt.Fprintln(a.out, "BuildDate:", cli.Built(buildTime).Time) }})
	return root
}

func (a *app) flags(root *cobra.Command) {
	f := root.Flags()
	f.SortFlags = false
	f.SetInterspersed(false)
	f.StringVarP(&a.path, "path", "p", ".", "folder to submit")
	f.StringVar(&a.build, "build", "", "build file to use instead of the folder's rai_build.yml")
	f.StringVarP(&a.queue, "queue", "q", "", "queue (default: raid's choice for you)")
	f.StringVar(&a.kind, "submit", "", "kind of submission: m1, m2, final …")
	f.StringVarP(&a.output, "output", "o", "", "folder to put /build into when the job has ended")
	f.BoolVar(&a.force, "force", false, "let --output write into a folder that is not empty")
	f.BoolVar(&a.detach, "detach", false, "print the job's number and leave")
	f.StringVar(&a.timeout, "timeout", "", "lower the time limit: 90s, 10m")
	f.StringVar(&a.gpus, "gpus", "", "number of GPUs")
	f.StringVar(&a.name, "name", "", "a name for the job")
	f.BoolVar(&a.json, "json", false, "events as JSON lines")
	f.StringVarP(&a.server, "server", "S", os.Getenv("RAI_SERVER"), "raid, as rai@host:port (default: RAI_SERVER, the profile's)")
	f.StringVarP(&a.identity, "identity", "i", "", "private key (default: the profile's, ssh-agent, ~/.ssh)")
	f.StringVar(&a.known, "known-hosts", "", "file with raid's host key (default: the profile's, ~/.ssh/known_hosts)")
	f.StringVar(&a.profile, "profile", os.Getenv("RAI_PROFILE"), "profile (default: RAI_PROFILE, ~/.rai_profile)")
	f.BoolVarP(&a.color, "color", "c", true, "colour on terminals")
	f.BoolVarP(&a.verbose, "verbose", "v", false, "say more")
	f.BoolVarP(&a.debug, "debug", "d", false, "say still more")
	f.StringVarP(&a.secret, "secret", "s", "", "")
	f.Lookup("secret").Hidden = true // RAI's; scripts still pass it
}

// connect logs in to raid as flags, environment and profile say, in that order.
func (a *app) connect(ctx context.Context) (*dial.Client, error) {
	p, err := a.readProfile()
	if err != nil {
		return nil, err
	}
	server, identity := a.server, a.identity
	if server == "" {
		server = p.Server
	}
	if server == "" {
		return nil, cli.Usagef("name it with --server rai@host:2222, RAI_SERVER, or server: in ~/.rai_profile", "no server named")
	}
	t, err := dial.Parse(server)
	if err != nil {
		return nil, cli.Usagef("", "%w", err)
	}
	// The profile's host key is that of the profile's server and of no other, and its
	// passwords are for that one only.
	own, err := dial.Parse(p.Server)
	mine := err == nil && own.Addr == t.Addr
	if a.accounts = new(profile.Profile); mine || p.Server == "" {
		a.accounts = p
	}
	if p.HostKey != "" && a.known == "" && mine {
		t.HostKeys = []string{p.HostKey}
	} else if err := t.Trust(a.known, identity); err != nil {
		return nil, err
	}
	if identity == "" {
		identity = p.KeyFile()
	}
	a.keyFile = identity
	if err := t.Identify(identity, cli.AskPassphrase); err != nil {
		return nil, err
	}
	c, err := dial.Dial(ctx, t)
	if err == nil && (a.verbose || a.debug) {
		a.say("connected to %s (%s)", t.Addr, c.ServerVersion())
	}
	return c, err
}

// readProfile reads the profile that was named, or looks for one. None at all is fine:
// flags may say everything.
func (a *app) readProfile() (*profile.Profile, error) {
	var p *profile.Profile
	var notes []string
	var err error
	if a.profile != "" {
		p, notes, err = profile.Read(a.profile)
	} else if home, e := os.UserHomeDir(); e != nil {
		return new(profile.Profile), nil
	} else if p, notes, err = profile.Find(home); errors.Is(err, profile.ErrNone) {
		return new(profile.Profile), nil
	}
	if err == nil && (a.verbose || a.debug) {
		for _, n := range notes {
			a.say("%s", n)
		}
	}
	return p, err
}
