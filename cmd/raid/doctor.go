package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"
)

// A finding is one line of doctor.
type finding struct {
	Level level  `json:"level"`
	What  string `json:"what"`
	Found string `json:"finding"`
	Fix   string `json:"fix,omitempty"` // what to do, in one or more lines
}

type level string

const (
	fine    level = "ok"
	warning level = "warning"
	broken  level = "error"
)

func good(what, format string, args ...any) finding {
	return finding{Level: fine, What: what, Found: fmt.Sprintf(format, args...)}
}

func warn(what, fix, format string, args ...any) finding {
	return finding{Level: warning, What: what, Found: fmt.Sprintf(format, args...), Fix: fix}
}

func bad(what, fix, format string, args ...any) finding {
	return finding{Level: broken, What: what, Found: fmt.Sprintf(format, args...), Fix: fix}
}

// A patient is what doctor looks at.
type patient struct {
	file  string // raid.toml, "" for none
	c     config // defaults where the file is broken
	state string // absolute
}

// A check looks at one thing and changes nothing. ctx bounds it.
type check struct {
	what string
	run  func(ctx context.Context, p *patient) []finding
}

var checks = [...]check{
	{"state folder", examineState},
	{"disk", examineDisk},
	{"port", examinePort},
	{"clock", examineClock},
	{"redis", examineRedis},
	{"blobs", examineBlobs},
	{"bubblewrap", examineBoxes},
	{"docker", examineDocker},
	{"registries", examineRegistries},
	{"gpu", examineGPUs},
}

func doctorCommand() *cobra.Command {
	var path, state, listen string
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "doctor [--state DIR] [--config raid.toml] [--json]",
		Short: "is this machine fit for raid and its runners",
		Long: "Looks at what raid serve and raid runner need of this machine and changes nothing.\n" +
			"Each line is ok, warning or error, and what to do about it. The exit status is 1 if there is an error.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := readConfig(path)
			if err != nil {
				c = defaults()
			}
			if cmd.Flags().Changed("state") {
				c.State = state
			}
			if cmd.Flags().Changed("listen") {
				c.Listen = listen
			}
			p := &patient{file: path, c: c}
			if p.state, err = absolute(c.State); err != nil {
				return err
			}
			return examine(cmd.Context(), p, cmd.OutOrStdout(), asJSON)
		},
	}
	cmd.Flags().StringVar(&path, "config", "", "raid.toml")
	cmd.Flags().StringVar(&state, "state", "/var/lib/raid", "the state folder")
	cmd.Flags().StringVar(&listen, "listen", ":2222", "where raid is to listen")
	cmd.Flags().BoolVar(&asJSON, "json", false, "one object a line")
	return cmd
}

// checkTime is how long one check may take. A tool may use 10 s and 2 s to end.
const checkTime = 15 * time.Second

// examine makes all checks at once and tells of each as soon as those before it are told.
func examine(ctx context.Context, p *patient, w io.Writer, asJSON bool) error {
	tell := printer(w, asJSON)
	all := examineConfig(p)
	errors := 0
	results := make([]chan []finding, len(checks))
	for i, c := range checks {
		results[i] = make(chan []finding, 1)
		go func() { results[i] <- bounded(ctx, c, p) }() // ends by itself, with what it waits for
	}
	for i := -1; i < len(results); i++ {
		if i >= 0 {
			all = <-results[i]
		}
		for _, f := range all {
			if f.Level == broken {
				errors++
			}
			if err := tell(f); err != nil {
				return err
			}
		}
	}
	if errors > 0 {
		return fmt.Errorf("doctor found %s", counted(errors, "error"))
	}
	return nil
}

func counted(n int, word string) string {
	if n == 1 {
		return "1 " + word
	}
	return fmt.Sprintf("%d %ss", n, word)
}

// bounded gives up on a check that does not end. What hangs in the kernel, on a network
// file system that has gone, cannot be ended: its goroutine stays until the process ends.
func bounded(ctx context.Context, c check, p *patient) []finding {
	ctx, cancel := context.WithTimeoutCause(ctx, checkTime, fmt.Errorf("no answer in %v", checkTime))
	defer cancel()
	found := make(chan []finding, 1)
	go func() { found <- c.run(ctx, p) }()
	select {
	case f := <-found:
		return f
	case <-time.After(checkTime + time.Second):
		return []finding{bad(c.what, "", "no answer in %v", checkTime)}
	}
}

// printer tells findings: aligned lines, in colour on a terminal, or JSON.
func printer(w io.Writer, asJSON bool) func(finding) error {
	if asJSON {
		return func(f finding) error { return json.NewEncoder(w).Encode(f) }
	}
	f, ok := w.(*os.File)
	colour := ok && term.IsTerminal(int(f.Fd())) && os.Getenv("NO_COLOR") == ""
	return func(f finding) error {
		_, err := io.WriteString(w, f.text(colour))
		return err
	}
}

// text is a finding for people: the first line of what was found, all else indented.
func (f finding) text(colour bool) string {
	word := fmt.Sprintf("%-8s", f.Level)
	if code := map[level]string{fine: "32", warning: "33", broken: "31"}[f.Level]; colour {
		word = "\033[" + code + "m" + word + "\033[0m"
	}
	first, rest, _ := strings.Cut(strings.TrimSpace(f.Found), "\n")
	s := word + " " + f.What + ": " + first + "\n"
	for line := range strings.Lines(rest + "\n" + f.Fix) {
		if line = strings.TrimRight(line, "\n"); line != "" {
			s += "         " + line + "\n"
		}
	}
	return s
}
