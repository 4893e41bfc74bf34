// Command raid is the service and its runners in one static binary:
//
//	raid serve --state DIR --listen ADDR      the SSH service, with its local runners
//	raid runner --state DIR                   one runner
//	raid shim                                 PID 1 of a box; runners start it
//
// Only this package knows flags and raid.toml.
package main

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"

	"github.com/rai-project/raid/runner/shim"
	"github.com/rai-project/raid/sshd"
)

// buildTime is set by the Makefile with -ldflags -X.
var buildTime string

func main() {
	if len(os.Args) > 1 && os.Args[1] == "shim" { // before anything else: a box counts its milliseconds
		os.Exit(shim.Main())
	}
	if err := root().Execute(); err != nil {
		fmt.Fprintf(os.Stderr, "raid: %v\n", err)
		var h *hinted
		if errors.As(err, &h) {
			fmt.Fprintf(os.Stderr, "raid: %s\n", h.hint)
		}
		os.Exit(1)
	}
}

func root() *cobra.Command {
	cmd := &cobra.Command{
		Use:           "raid",
		Short:         "SSH-native remote builds for GPU classes and labs",
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	cmd.CompletionOptions.HiddenDefaultCmd = true
	cmd.AddCommand(serveCommand(), runnerCommand(),
		&cobra.Command{Use: "version", Short: "which raid this is", Args: cobra.NoArgs,
			Run: func(cmd *cobra.Command, _ []string) { fmt.Fprintln(cmd.OutOrStdout(), version()) }},
		&cobra.Command{Use: "buildtime", Short: "when this raid was built", Args: cobra.NoArgs,
			Run: func(cmd *cobra.Command, _ []string) { fmt.Fprintln(cmd.OutOrStdout(), version().BuildTime) }})
	return cmd
}

// version reads what the linker left in the binary.
func version() sshd.Version {
	v := sshd.Version{Version: "devel", BuildTime: buildTime, Go: runtime.Version()}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return v
	}
	if info.Main.Version != "" && info.Main.Version != "(devel)" {
		v.Version = info.Main.Version
	}
	for _, s := range info.Settings {
		switch {
		case s.Key == "vcs.revision":
			v.Commit = s.Value[:min(12, len(s.Value))]
		case s.Key == "vcs.time" && v.BuildTime == "":
			v.BuildTime = s.Value
		}
	}
	if v.BuildTime == "" {
		v.BuildTime = "unknown"
	}
	return v
}

// hinted is an error with a line about what to do.
type hinted struct {
	error
	hint string
}

func (h *hinted) Unwrap() error { return h.error }

func hintf(err error, format string, args ...any) error {
	return &hinted{err, fmt.Sprintf(format, args...)}
}
