package sshd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strings"

	"github.com/anmitsu/go-shlex"
	"github.com/spf13/pflag"

	"github.com/rai-project/raid/keys"
	"github.com/rai-project/raid/runner/job"
	"github.com/rai-project/raid/sshd/brain"
	"github.com/rai-project/raid/sshd/door"
	"github.com/rai-project/raid/sshd/store"
)

// A command is one row of the table. Help, usage errors and access control are made
// from it, so they cannot disagree.
type command struct {
	name   string
	role   keys.Role // least role; keys.Runner for machines only
	usage  string
	about  string
	hidden bool                                      // not in the list of help
	flags  func(*pflag.FlagSet)                      // nil: none
	args   [2]int                                    // fewest and most words; most < 0: any number
	run    func(context.Context, *call) (int, error) // status counts when the error is nil
}

// table is every command, in the order help shows them.
func table() []command {
	return []command{
		{name: "submit", role: keys.Student, usage: "[flags] [-- CMD…] < project.tar", args: [2]int{0, -1}, flags: submitFlags, run: runSubmit,
			about: "run a project as its rai_build.yml says (tar, tar.gz, tar.zst, zip)"},
		{name: "attach", role: keys.Student, usage: "JOB", args: [2]int{1, 1}, flags: jsonFlag, run: runAttach,
			about: "follow a job from its first line; exits with the job's status"},
		{name: "logs", role: keys.Student, usage: "JOB [-f] [-n LINES]", args: [2]int{1, 1}, flags: logsFlags, run: runLogs,
			about: "what a job has printed, stdout and stderr kept apart"},
		{name: "status", role: keys.Student, usage: "[JOB]", args: [2]int{0, 1}, flags: jsonFlag, run: runStatus,
			about: "one job, or your team's jobs of the last day"},
		{name: "queue", role: keys.Student, flags: jsonFlag, run: runQueue,
			about: "what runs and what waits, in the order it will start"},
		{name: "history", role: keys.Student, usage: "[-n N] [--user USER]", flags: historyFlags, run: runHistory,
			about: "your team's jobs, newest first"},
		{name: "runners", role: keys.Student, flags: jsonFlag, run: runRunners,
			about: "the machines jobs run on"},
		{name: "cancel", role: keys.Student, usage: "JOB…", args: [2]int{1, -1}, flags: jsonFlag, run: runCancel,
			about: "end jobs, waiting or running"},
		{name: "rerun", role: keys.Student, usage: "JOB", args: [2]int{1, 1}, flags: rerunFlags, run: runRerun,
			about: "run the same upload again, as a new job"},
		{name: "why", role: keys.Student, usage: "JOB", args: [2]int{1, 1}, flags: jsonFlag, run: runWhy,
			about: "what a job waits for, or why it ended as it did"},
		{name: "output", role: keys.Student, usage: "JOB [PATH] > build.tar", args: [2]int{1, 2}, flags: linkFlags, run: runOutput,
			about: "the /build folder as the job left it, or one path of it, as tar"},
		{name: "source", role: keys.Student, usage: "JOB > project.tar", args: [2]int{1, 1}, flags: linkFlags, run: runSource,
			about: "what was pushed, byte for byte"},
		{name: "whoami", role: keys.Guest, flags: jsonFlag, run: runWhoami, about: "who raid thinks you are"},
		{name: "version", role: keys.Guest, flags: jsonFlag, run: runVersion, about: "which raid this is"},
		{name: "buildtime", role: keys.Guest, run: runBuildtime, about: "when this raid was built"},
		{name: "help", role: keys.Guest, usage: "[COMMAND]", args: [2]int{0, 1}, run: runHelp, about: "this list, or one command in full"},
		{name: "admin", role: keys.Staff, usage: "enroll | disk | mirror | raids | pause POOL | resume POOL | drain RUNNER | undrain RUNNER", args: [2]int{1, -1}, hidden: true, flags: jsonFlag, run: runAdmin,
			about: "for staff: enrol people (rai-keygen speaks this), see how the disk, the mirror and the other raids are doing, hold back pools and runners"},
		{name: "runner", role: keys.Runner, usage: "join | source JOB FENCE | attempt JOB FENCE [share]", args: [2]int{1, 4}, hidden: true, run: runRunner,
			about: "what runners say to raid"},
	}
}

// may reports whether a role may use a command.
func (c *command) may(r keys.Role) bool {
	return r.AtLeast(c.role) || c.role == keys.Guest && r == keys.Runner
}

// A call is one command of one session, parsed.
type call struct {
	*door.Session
	s     *Server
	cmd   *command
	flags *pflag.FlagSet
	args  []string
	tail  string // the text after " -- ", verbatim; submit only
}

// A failure is an error a user caused or can do something about: one sentence, a
// hint, and the exit status that goes with it.
type failure struct {
	code int
	text string
	hint string
}

func (f *failure) Error() string { return f.text }

func failf(code int, hint, format string, args ...any) error {
	return &failure{code, fmt.Sprintf(format, args...), hint}
}

// Handle runs one session; it is the only place that turns errors into text and
// exit status. It is [door.Config.Handle].
func (s *Server) Handle(ctx context.Context, d *door.Session) int {
	status, err := s.serve(ctx, d)
	if err == nil {
		return status
	}
	return s.explain(ctx, d, err)
}

func (s *Server) explain(ctx context.Context, d *door.Session, err error) int {
	var f *failure
	switch {
	case errors.As(err, &f):
	case errors.Is(context.Cause(ctx), store.ErrDeposed):
		f = &failure{job.ExitTryLater, "this raid leads no more, so it does nothing more; jobs go on", "the same command once more finds the one that does (attach JOB, for a job you were following)"}
	case errors.Is(context.Cause(ctx), door.ErrShutdown), errors.Is(err, brain.ErrClosed), errors.Is(err, fs.ErrClosed):
		f = &failure{job.ExitTryLater, "raid is restarting", "try again in a moment"}
	case ctx.Err() != nil:
		return job.ExitCancelled // nobody is there to read a reason
	case errors.Is(err, brain.ErrUnavailable):
		s.Log.Error("session", "id", d.ID, "user", d.Who.User, "command", d.Command, "err", err)
		f = &failure{job.ExitTryLater, "raid cannot save anything at the moment", "your running jobs go on; try again in a few minutes"}
		if errors.Is(err, store.ErrAmbiguous) {
			f.text, f.hint = "raid cannot save anything at the moment, and does not know whether it has saved this", "look before you try again: ssh … status"
		}
	case errors.Is(err, store.ErrUnavailable): // of what is not in memory: old jobs
		s.Log.Error("session", "id", d.ID, "user", d.Who.User, "command", d.Command, "err", err)
		f = &failure{job.ExitTryLater, "raid cannot look anything up at the moment", "your running jobs go on; try again in a few minutes"}
	case storeFailure(err) != nil:
		s.Log.Error("session", "id", d.ID, "user", d.Who.User, "command", d.Command, "err", err)
		f = storeFailure(err)
	default:
		s.Log.Error("session", "id", d.ID, "user", d.Who.User, "command", d.Command, "err", err)
		f = &failure{job.ExitInfra, "something went wrong inside raid", "tell staff the session " + d.ID}
	}
	for line := range strings.Lines(f.text + "\n" + f.hint) {
		say(d, "%s", clean(strings.TrimSuffix(line, "\n"))) // words of the caller's are in it
	}
	return f.code
}

// say prints one line of raid's own.
func say(d *door.Session, format string, args ...any) {
	fmt.Fprintf(d.Stderr(), "raid: "+format+"\n", args...)
}

func (c *call) say(format string, args ...any) { say(c.Session, format, args...) }

// serve finds the command and runs it.
func (s *Server) serve(ctx context.Context, d *door.Session) (int, error) {
	line, tail := d.Command, ""
	if strings.HasPrefix(strings.TrimLeft(line, " "), "submit ") {
		line, tail, _ = strings.Cut(line, " -- ")
	}
	words, err := shlex.Split(line, true)
	if err != nil {
		return 0, failf(job.ExitUsage, "quote it for the shell and once more for raid", "unbalanced quotes in the command")
	}
	if len(words) == 0 {
		return runGreeting(ctx, &call{Session: d, s: s})
	}
	for _, c := range table() {
		if c.name == words[0] { // c is a copy: the session keeps one command, not the table
			return s.start(ctx, d, &c, words[1:], tail)
		}
	}
	return 0, failf(job.ExitUsage, "the commands are listed by: ssh … help", "no command %s", quote(words[0]))
}

func (s *Server) start(ctx context.Context, d *door.Session, cmd *command, words []string, tail string) (int, error) {
	if !cmd.may(d.Who.Role) {
		return 0, refused(d, cmd)
	}
	c := &call{Session: d, s: s, cmd: cmd, tail: tail, flags: pflag.NewFlagSet(cmd.name, pflag.ContinueOnError)}
	c.flags.SetOutput(io.Discard)
	help := c.flags.BoolP("help", "h", false, "this text")
	if cmd.flags != nil {
		cmd.flags(c.flags)
	}
	if err := c.flags.Parse(words); err != nil {
		return 0, failf(job.ExitUsage, "see: ssh … help "+cmd.name, "%s: %s", cmd.name, err)
	}
	if *help {
		return 0, describe(d, cmd)
	}
	c.args = c.flags.Args()
	if n := len(c.args); n < cmd.args[0] || cmd.args[1] >= 0 && n > cmd.args[1] {
		return 0, failf(job.ExitUsage, "more: ssh … help "+cmd.name, "usage: ssh … %s", strings.TrimSpace(cmd.name+" "+cmd.usage))
	}
	return cmd.run(ctx, c)
}

// refused says why somebody may not use a command.
func refused(d *door.Session, cmd *command) error {
	if d.Who.Role == keys.Guest {
		return failf(job.ExitRefused, "ask your course staff to enrol it; the key is chosen by: ssh -i KEY -o IdentitiesOnly=yes …",
			"this key (%s) is not enrolled", d.Who.Fingerprint)
	}
	return failf(job.ExitRefused, "", "%s is for %s only; you are %s", cmd.name, cmd.role, d.Who.Role)
}

func runHelp(_ context.Context, c *call) (int, error) {
	all := table()
	if len(c.args) == 1 {
		for i := range all {
			if all[i].name == c.args[0] && all[i].may(c.Who.Role) {
				return 0, describe(c.Session, &all[i])
			}
		}
		return 0, failf(job.ExitUsage, "the commands are listed by: ssh … help", "no command %s", quote(c.args[0]))
	}
	fmt.Fprintln(c, "usage: ssh rai@host COMMAND\n\n  tar cf - . | ssh rai@host submit\n\ncommands:")
	for i := range all {
		if k := &all[i]; !k.hidden && k.may(c.Who.Role) {
			fmt.Fprintf(c, "  %-10s %s\n", k.name, k.about)
		}
	}
	fmt.Fprint(c, helpEnd)
	return 0, nil
}

const helpEnd = `
Your job's output comes back as it is printed: stdout on stdout, stderr on
stderr, raid's own lines on stderr with "raid: " before them. ssh exits with
the job's status. Ctrl-C cancels; a lost connection does not.

exit status:
  the job's own, or 128+N for signal N, and of raid itself
  64 usage   65 bad input   75 try later   124 time limit   125 raid's fault
  126 refused   130 cancelled   137 out of memory   153 output or disk limit
`

func describe(w io.Writer, cmd *command) error {
	fmt.Fprintf(w, "usage: ssh rai@host %s\n\n%s\n", strings.TrimSpace(cmd.name+" "+cmd.usage), cmd.about)
	fs := pflag.NewFlagSet(cmd.name, pflag.ContinueOnError)
	if cmd.flags != nil {
		cmd.flags(fs)
		fs.VisitAll(func(f *pflag.Flag) {
			if f.DefValue == "-1" { // it stands for none
				f.DefValue = "0"
			}
		})
		fmt.Fprintf(w, "\nflags:\n%s", strings.ReplaceAll(fs.FlagUsages(), "[=true|false]", "             ")) // as wide
	}
	return nil
}

func jsonFlag(f *pflag.FlagSet) { f.Bool("json", false, "one JSON object a line on stdout") }

func (c *call) json() bool {
	on, err := c.flags.GetBool("json")
	return err == nil && on
}

// The flag's value; the commands ask only for flags they declared.
func (c *call) flag(name string) string { return c.flags.Lookup(name).Value.String() }
func (c *call) on(name string) bool     { return c.flag(name) == "true" }

// quote makes a stranger's word safe to print.
func quote(s string) string {
	if len(s) > 64 {
		s = s[:64] + "…"
	}
	return fmt.Sprintf("%q", s)
}
