package main

import (
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/rai-project/raid/sshd/queue/sim"
)

func simulateCommand() *cobra.Command {
	var seed uint64
	var picture string
	cmd := &cobra.Command{
		Use:   "simulate [--seed N] [--svg FILE]",
		Short: "how fair the queue is: made-up classes in virtual time, beside other orders",
		Long: "Runs three classes through first come first served, round robin by team, and raid's own queue:\n" +
			"users who always have jobs waiting, a deadline night with two hogs, and RAI's class of 40,000 jobs.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			r := sim.Compare(seed, func(load, order string) { fmt.Fprintf(os.Stderr, "raid: %s: %s\n", load, order) })
			if err := r.Print(cmd.OutOrStdout()); err != nil {
				return err
			}
			if picture == "" {
				return nil
			}
			f, err := os.Create(picture)
			if err != nil {
				return err
			}
			if err := r.Draw(f); err != nil {
				f.Close()
				return err
			}
			return f.Close()
		},
	}
	cmd.Flags().Uint64Var(&seed, "seed", 1, "another class of the same kind")
	cmd.Flags().StringVar(&picture, "svg", "", "draw it into this file")
	return cmd
}
